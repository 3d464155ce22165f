"""What all plots share."""


def new_figure(xlabel: str, ylabel: str):
    """Give a matplotlib figure and its axes, without pyplot: no global state, no display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    return figure, figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
