"""The page and the tables of a compare: what is said of which figures, and what breaks neither."""

import math
import re

import pytest
from markup import Reader

from litflora.report import Point, Report, Sweep, markdown, page
from litflora.report.scatter import Mark, _tags, front
from litflora.report.svg import COLOURS, marker


def point(tmp_path, **changes):
    same = {"rank": None, "rate": 0.1, "val_metric": "val/acc", "test_metric": "test/acc"}
    figures = {"parameters": 10, "saved_bytes": 0, "seconds": 1.0, "tests": ["again"]}
    runs = {"val": [0.5], "test": [0.5], "seeds": [0], "folders": [tmp_path], "commands": ["x"]}
    source = {"source": [], "forgotten": []}
    return Point(**{"tuning": "<b>", **same, **figures, **runs, **source, **changes})


def gathered(points, **changes):
    same = {"recipe": "r", "command": "litflora compare r", "budget": [], "sweeps": []}
    same |= {"tunings": {p.tuning: 1 for p in points}, "changing": {}, "errors": [], "progress": ""}
    return Report(**{"points": points, **same, **changes})


def report(points, **changes):
    return page(gathered(points, **changes))


def test_names_are_text_and_one_point_is_enough(tmp_path):
    html = report([point(tmp_path)], recipe="my & recipe", budget=[("max_epochs", "1")])
    assert Reader(html).open == []
    assert "<b>" not in html
    assert "&lt;b&gt; on my &amp; recipe" in html


def test_seeds_are_shown_as_a_spread(tmp_path):
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder_, last in zip(folders, ("0.4", "0.6"), strict=True):
        folder_.mkdir()
        (folder_ / "metrics.csv").write_text(f"step,val/acc\n4,0.2\n9,{last}\n")
    runs = {"folders": folders, "seeds": [0, 1], "test": [0.4, 0.5], "val": [0.4, 0.6]}
    html = report([point(tmp_path, **runs)])
    assert "0.4500 ± 0.0707 over 2 seeds" in html
    assert html.count('class="bar"') == 3  # of the three costs
    assert html.count('class="band"') == 1
    assert "At the end: &lt;b&gt; 0.5." in html


def test_what_is_no_number_breaks_no_page(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "step,val/acc,source/acc\n4,0.2,nan\n9,nan,0.5\n14,inf,\n"
    )
    broken = point(tmp_path, test=[math.nan, 0.5], val=[0.1, 0.2], seeds=[0, 1])
    html = report([broken], sweeps=[Sweep("<b>", [], {0.1: math.nan, 0.2: "not done"})])
    assert "<td>nan</td>" in html
    assert "<td>nan</td><td>not done</td>" in html
    assert "At the end: &lt;b&gt; 0.2." in html


def test_a_mean_over_fewer_seeds_is_told_and_never_the_best(tmp_path):
    seeds = {"seeds": [0, 1], "val": [0.5, 0.5]}
    some = point(tmp_path, tuning="some", test=[0.9], **seeds)
    html = report([some, point(tmp_path, tuning="all", test=[0.4, 0.5], **seeds)])
    assert "<td>0.9000 (1 of 2 seeds)</td>" in html
    assert "<strong>0.4500 ± 0.0707</strong>" in html
    assert '<p class="lead">all has the best' in html
    assert "Mean ± standard deviation over 2 seeds" in html


def test_the_opening_names_the_best_by_validation(tmp_path):
    flattered = point(tmp_path, tuning="flattered", val=[0.4], test=[0.9])
    html = report([flattered, point(tmp_path, tuning="best", val=[0.6], test=[0.5])])
    assert "best has the best val/acc, and comes to test/acc 0.5000 of one seed, which" in html
    assert "Figures are of one seed; the best test/acc is bold" in html


def test_the_page_holds_the_commands(tmp_path):
    html = report([point(tmp_path)], command="litflora compare 'my recipe'")
    assert "<pre>litflora compare &#x27;my recipe&#x27;</pre>" in html
    assert "<pre>x\nagain</pre>" in html


def test_a_rate_at_the_end_of_what_was_tried_is_told(tmp_path):
    tried = {0.01: 0.4, 0.1: 0.5, 1.0: "failed"}
    inner = report([point(tmp_path)], sweeps=[Sweep("<b>", [0.1], tried)])
    assert '<th scope="col">tuning</th><th scope="col">0.01</th>' in inner
    assert "<strong>0.5000</strong> (chosen)" in inner
    assert "<td>failed</td>" in inner
    assert "Chosen at the end" not in inner
    ends = report([point(tmp_path)], sweeps=[Sweep("<b>", [0.01], tried)])
    assert "may be better: &lt;b&gt;." in ends


def test_a_page_before_anything_is_done():
    told = {"tunings": {"LoRA": 1, "Full": 1}, "progress": "Unfinished: 0 of 3 runs done."}
    html = report([], errors=[("a", "it broke")], **told)
    assert Reader(html).open == []
    assert "<h1>LoRA, Full on r</h1>" in html
    assert "No run has been tested yet." in html
    assert "<p>Unfinished: 0 of 3 runs done.</p>" in html
    assert "it broke" in html


def test_what_was_forgotten_is_in_table_and_chart(tmp_path):
    assert "Learnt and forgotten" not in report([point(tmp_path)])
    (tmp_path / "metrics.csv").write_text("step,source/acc\n0,0.9\n2,0.75\n")
    seeds = {"seeds": [0, 1], "val": [0.5, 0.5], "test": [0.5, 0.5]}
    logged = point(tmp_path, source=[0.75, 0.65], forgotten=[0.15, 0.25], **seeds)
    points = [logged, point(tmp_path, tuning="silent", **seeds)]
    html = report(points)
    assert "<h2>Learnt and forgotten</h2>" in html
    assert "0.5 at 0.7" in html
    assert html.count('class="base"') == 2  # the line, and the same in the legend
    assert "base, before tuning</title>" in html
    assert "<td>0.2000 ± 0.0707</td>" in html
    assert "| 0.5000 ± 0.0000 | 0.2000 ± 0.0707 | 0.1 |" in markdown(gathered(points))
    assert "| forgotten |" not in markdown(gathered(points[1:]))


def lead(*points, **changes):
    return re.search('<p class="lead">(.*?)\\.(?: Each|</p>)', report(points, **changes))[1]


def test_rows_that_tie_are_all_named(tmp_path):
    tied = [point(tmp_path, tuning=name, test=[t]) for name, t in (("a", 0.5), ("b", 0.6))]
    worse = point(tmp_path, tuning="c", val=[0.4])
    assert lead(*tied, worse) == (
        "a and b have the best val/acc, and come to test/acc 0.5000 and 0.6000 of one seed, "
        "which has no spread"
    )


@pytest.mark.parametrize(("second", "close"), [([0.4, 0.6], True), ([0.1, 0.15], False)])
def test_a_gap_within_the_spread_is_told(second, close, tmp_path):
    seeds = {"seeds": [0, 1], "test": [0.5, 0.5]}
    first = point(tmp_path, tuning="a", val=[0.5, 0.54], **seeds)
    said = lead(first, point(tmp_path, tuning="b", val=second, **seeds))
    gap = ", 0.0200 ahead of b and so within the spread over seeds of 0.1414, and" in said
    assert gap == close
    assert said.endswith("comes to test/acc 0.5000 ± 0.0000 over 2 seeds")


def test_the_best_of_an_unfinished_compare_is_so_only_so_far(tmp_path):
    assert "best val/acc so far" in lead(point(tmp_path), progress="Unfinished: 1 of 2 runs done.")


def test_a_tuning_that_came_to_nothing_has_a_row(tmp_path):
    lost = {"val": [math.nan], "test": [math.nan], "folders": [], "tests": [], "rate": None}
    lost = point(tmp_path, tuning="DoRA", rank=8, lost="diverged at every rate", **lost)
    cells = "<td>nan</td><td>nan</td><td>diverged at every rate</td><td>10</td>"
    assert f'<th scope="row">DoRA r=8</th>{cells}' in report([lost])
    assert "| DoRA r=8 | nan | nan | diverged at every rate | 10 |" in markdown(gathered([lost]))
    assert lead(lost) == "No run has been tested. DoRA r=8 diverged at every rate"
    assert "only. DoRA r=8 diverged at every rate.</p>" in report([lost, point(tmp_path)])


def test_one_epoch_is_a_dot(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,val/acc\n4,0.2\n")
    html = report([point(tmp_path)])
    assert html.count('<circle class="dot"') == 1
    (tmp_path / "metrics.csv").write_text("step,val/acc\n0,0.1\n4,0.2\n")
    assert report([point(tmp_path)]).count('<circle class="dot" cx="') == 2  # from the base on


def test_names_are_no_markup(tmp_path):
    named = point(tmp_path, tuning="a|b\n`<i>*.yaml", tests=["litflora test 'x\ny'"])
    table = markdown(gathered([named], tunings={}, command="c")).splitlines()
    assert table[2].startswith(r"| a\|b \`\<i>\*.yaml | 0.5000 |")
    assert table[-3:] == ["    c", "    litflora test 'x", "    y'"]


def test_a_table_says_how_it_came_about(tmp_path):
    tunings = {"Probe": 1, "Full": 3, "tuning/lisa": 3, "LoRA": 2}
    told = {"tunings": tunings, "changing": {"tuning/lisa": "LISA"}}
    done = gathered(
        [point(tmp_path, tuning="Probe")], progress="Unfinished: 3 of 9 runs done.", **told
    )
    table = markdown(done)
    assert table.startswith("Unfinished: 3 of 9 runs done.\n\n| tuning |")
    tries = "one rate only for Probe; 2 rates for LoRA; 3 rates for Full, tuning/lisa."
    costs = "those of the start of training, and change later for tuning/lisa (LISA)."
    assert all(said in text for said in (tries, costs) for text in (table, page(done)))
    even = markdown(gathered([point(tmp_path)]))
    assert "Tries" not in even
    assert "those of the start of training." in even


@pytest.mark.parametrize("found", [b"\x89PNG\xff\x00", b"step,val/acc\na,b,c\n", b"val/acc\n1\n"])
def test_a_file_that_cannot_be_read_costs_its_picture_alone(found, tmp_path):
    names = ("metrics.csv", "test/class_accuracy.csv", "spectra.csv", "gallery/epoch_1.png")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(found)
    html = report([point(tmp_path)])
    assert "<h2>Results</h2>" in html
    assert not re.search("<h2>(Learning curves|Classes|Pictures)", html)


def test_every_tuning_has_a_look_of_its_own():
    drawn = [(n % COLOURS, re.search(' d="(.*)"', marker(n, 0, 0))[1]) for n in range(20)]
    assert len(set(drawn)) == 20


def test_labels_do_not_overprint():
    texts = _tags(["8"] * 6, [(100.0, 100.0 + n) for n in range(6)])
    places = [tuple(map(float, re.findall('[xy]="(.*?)"', text))) for text in texts if text]
    assert len(places) == 4  # there is no room for more
    assert all(
        abs(x - u) >= 7 or abs(y - v) >= 10
        for n, (x, y) in enumerate(places)
        for u, v in places[:n]
    )
    assert _tags(["", "16"], [(0.0, 0.0), (50.0, 0.0)])[0] == ""


def test_pictures_of_a_run_are_inside_the_page(tmp_path):
    from PIL import Image

    for name in ("gallery/epoch_001.png", "gallery/epoch_002.png", "spectra.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (2000, 1000), "red").save(tmp_path / name)
    (tmp_path / "spectra.csv").write_text("name,norm\nhead,0.5\n")
    found = Reader(report([point(tmp_path)])).all("img")
    assert found[1]["alt"].endswith(". Its figures: name,norm; head,0.5")
    assert [attrs["alt"].partition(": ")[2][:10] for attrs in found] == ["validation", "singular v"]
    assert all(len(attrs["src"]) < 20_000 for attrs in found)


@pytest.mark.parametrize(
    ("low_x", "low_y", "best"),
    [(True, False, "ac"), (False, False, "dc"), (True, True, "a"), (False, True, "dba")],
)
def test_the_front(low_x, low_y, best):
    places = {"a": (1, 0.5), "b": (2, 0.55), "c": (2, 0.9), "d": (3, 0.6)}
    marks = [Mark(name, "", 0, x, y, 0.0) for name, (x, y) in places.items()]
    assert "".join(mark.label for mark in front(marks, low_x, low_y)) == best


def test_equals_are_both_on_the_front():
    marks = [Mark(name, "", 0, x, 0.5, 0.0) for name, x in {"a": 1, "b": 1, "c": 2}.items()]
    assert [mark.label for mark in front(marks, low_x=True, low_y=False)] == ["a", "b"]
