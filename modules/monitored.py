"""The metric that a task is judged by."""


def lower_is_better(metric: str) -> bool:
    """Whether a metric is a loss.

    Args:
        metric: Its name, as it is logged.
    """
    return metric.endswith("loss")
