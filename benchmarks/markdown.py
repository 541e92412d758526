"""How figures are written in Markdown."""


def table(header, rows):
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def times(value):
    return "-" if value is None or value != value else f"{value:.2f}x" if value < 10 else f"{value:.1f}x"


def microseconds(value):
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def error(figure):
    return "-" if figure is None else f"{figure:.2f}" if figure < 100 else f"{figure:,.0f}" if figure < 1e6 else f"{figure:.0e}"
