"""The one exception the engine raises for a person's mistake."""


class AdapterError(ValueError):
    """A request that cannot be met: the message names the thing and the remedy."""
