"""How the page looks: in light and in dark, from a phone's width on."""

_LIGHT = ("#0b62a8", "#c2410c", "#0f766e", "#8b2fa0", "#7a5c00", "#475569", "#b3195a", "#3f6212")
_DARK = ("#6cb6ff", "#ff9b6b", "#4fd1c1", "#d9a0ff", "#e5c454", "#a8b3c4", "#ff8fb8", "#a8d46f")


def _series(colours: tuple[str, ...]) -> str:
    return "".join(f".s{n}{{--ink:{colour}}}" for n, colour in enumerate(colours))


STYLE = (
    """
:root{color-scheme:light dark;--page:#fff;--text:#1c2430;--soft:#566072;--line:#d9dee6;
--fill:#f4f6f9;--focus:#0b62a8}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1160px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:1.7rem;line-height:1.25;margin:.2em 0 .4em;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.2em 0 .6em}
p,dl{max-width:70ch}
.lead{font-size:1.08rem;overflow-wrap:anywhere}
.soft,figcaption{color:var(--soft);font-size:.9rem}
dl.budget{display:flex;flex-wrap:wrap;gap:8px;margin:1em 0;max-width:none}
dl.budget div{background:var(--fill);border:1px solid var(--line);border-radius:8px;
padding:4px 12px}
dl.budget dt{font-size:.8rem;color:var(--soft)}
dl.budget dd{margin:0;overflow-wrap:anywhere}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:8px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
figcaption{margin-top:6px}
th,td{padding:6px 12px;text-align:right;white-space:nowrap;border-top:1px solid var(--line)}
tr:first-child>*{border-top:0}
tbody tr:first-child>*{border-top:1px solid var(--line)}
th{font-weight:600}
thead th{background:var(--fill)}
th:first-child{text-align:left}
tbody th{white-space:normal;overflow-wrap:anywhere;min-width:9rem}
.grid-of{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr));gap:20px}
.charts{grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr))}
figure{margin:0;min-width:0}
figure.wide{max-width:560px}
svg,img{display:block;width:100%;height:auto}
img{background:#fff;border:1px solid var(--line);border-radius:8px}
svg{background:var(--page);border:1px solid var(--line);border-radius:8px;overflow:visible}
svg text{font-size:12px;fill:var(--soft)}
svg .name{fill:var(--text);font-weight:600}
svg .mid{text-anchor:middle}
svg .end{text-anchor:end}
.axis{fill:none;stroke:var(--soft)}
.grid{stroke:var(--line)}
.front{fill:none;stroke:var(--soft);stroke-dasharray:4 4}
.base{stroke:var(--text);stroke-width:1.5}
.ring{fill:none;stroke:var(--ink);stroke-width:1.5}
.bar{stroke:var(--ink);stroke-width:1.5}
.dot{fill:var(--ink)}
.band{fill:var(--ink);opacity:.13}
.curve{fill:none;stroke:var(--ink);stroke-width:2}
svg .tag,svg .tip{fill:var(--text)}
svg .tip{visibility:hidden;font-weight:600;paint-order:stroke;stroke:var(--page);stroke-width:4px}
.mark:hover .tip,.mark:focus .tip{visibility:visible}
.mark:focus{outline:none}
.mark:focus .dot,.mark:hover .dot{stroke:var(--text);stroke-width:.35}
.mark:focus .curve,.mark:hover .curve{stroke-width:4}
.mark:focus .band,.mark:hover .band{opacity:.3}
ul.key{list-style:none;display:flex;flex-wrap:wrap;gap:4px 20px;padding:0;margin:0 0 12px}
ul.key svg{display:inline-block;width:34px;height:16px;border:0;vertical-align:-2px;
background:none;margin-right:6px}
.score{display:inline-block;min-width:72px;padding:0 4px;border-radius:4px;
background:linear-gradient(to right,var(--track) var(--share),transparent 0)}
:root{--track:#cfe2f5}
pre{background:var(--fill);border:1px solid var(--line);border-radius:8px;padding:12px;
white-space:pre-wrap;overflow-wrap:anywhere;font-size:.85rem;margin:8px 0}
summary{cursor:pointer;padding:4px 0}
:focus-visible{outline:2px solid var(--focus);outline-offset:2px}
"""
    + _series(_LIGHT)
    + "@media(prefers-color-scheme:dark){:root{--page:#12161c;--text:#e6eaf0;--soft:#a3adbb;"
    "--line:#2c3440;--fill:#1a2028;--focus:#6cb6ff;--track:#1f3d5c}"
    + _series(_DARK)
    + "}@media print{.scroll{overflow:visible}}"
)
