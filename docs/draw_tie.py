"""Draw docs/tie.svg, the first picture in README.md. Run `python docs/draw_tie.py` to write the file.

The picture shows an adapter on qkv with two pipeline stages and two tensor-parallel ranks. docs/parallelism.md lists
the tensors on each rank. The picture has its own background, so that it is readable on light and dark pages.
"""

from pathlib import Path
from xml.sax.saxutils import escape

PICTURE = Path(__file__).with_name("tie.svg")
WIDTH, HEIGHT, PANEL, GAP, MARGIN = 960, 484, 396, 136, 16
INK, FAINT, PAPER, CARD, LINE = "#1f2328", "#57606a", "#ffffff", "#f3f5f8", "#c4cad2"
RANKS, BOTH, TIE = ("#a9cdf3", "#f8cf95"), "#d9dde3", "#b3261e"  # colours: tensor ranks, replicas, tied pair


def rect(x: float, y: float, width: float, height: float, fill: str, line: str = LINE, radius: int = 4) -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}" fill="{fill}" stroke="{line}"/>'
    )


def text(
    x: float, y: float, words: str, *, size: int = 16, fill: str = INK, anchor: str = "middle", style: str = ""
) -> str:
    place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}"'
    return f'<text {place} font-size="{size}" fill="{fill}"{style}>{escape(words)}</text>'


def path(steps: str, *, colour: str = INK, width: float = 1.5, ends: str = ' marker-end="url(#ink)"') -> str:
    return f'<path d="{steps}" fill="none" stroke="{colour}" stroke-width="{width:g}"{ends}/>'


def halves(x: float, y: float, width: float, height: float, name: str, *, rows: bool = False) -> list[str]:
    """Return the SVG elements of a tensor that two tensor ranks shard by columns, or by rows if `rows` is set."""
    w, h = (width, height / 2) if rows else (width / 2, height)
    second = (x, y + h) if rows else (x + w, y)
    return [
        rect(x, y, w, h, RANKS[0], radius=0),
        rect(*second, w, h, RANKS[1], radius=0),
        text(x + width / 2, y + height / 2 + 6, name, style=' font-weight="bold"'),
    ]


def layer(x: float, y: float, number: int) -> list[str]:
    """Return the SVG elements of a layer: the frozen weight W and the vectors u and v."""
    return [
        rect(x, y, 318, 46, PAPER),
        text(x + 12, y + 29, f"layer {number}", anchor="start"),
        *halves(x + 100, y + 8, 96, 30, "W", rows=True),
        rect(x + 212, y + 8, 42, 30, BOTH, radius=0),
        text(x + 233, y + 28, f"u{subscript(number)}", style=' font-weight="bold"'),
        *halves(x + 266, y + 8, 42, 30, f"v{subscript(number)}", rows=True),
    ]


def subscript(number: int) -> str:
    return "".join(chr(ord("₀") + int(digit)) for digit in str(number))


def stage(x: float, index: int, numbers: tuple[int, int, int]) -> list[str]:
    """Return the SVG elements of a pipeline stage: three layers, and the copy of A and B that all layers use."""
    drawn = [
        rect(x, 62, PANEL, 346, CARD, radius=10),
        text(x + 20, 92, f"pipeline stage {index}", size=18, anchor="start", style=' font-weight="bold"'),
        text(x + PANEL - 20, 92, f"layers {numbers[0]} to {numbers[2]}", fill=FAINT, anchor="end"),
        text(x + 220, 227, "⋮", size=20, fill=FAINT),
    ]
    for number, y in zip(numbers, (106, 158, 238), strict=True):
        drawn += layer(x + 64, y, number)
        drawn.append(path(f"M {x + 30} 318 V {y + 23} H {x + 59}", colour=TIE, width=2, ends=' marker-end="url(#tie)"'))
    drawn += [
        rect(x + 14, 302, PANEL - 28, 92, PAPER, TIE, radius=6),
        text(x + 30, 340, "one pair", fill=TIE, anchor="start", style=' font-weight="bold"'),
        text(x + 30, 362, "for all layers", fill=TIE, anchor="start"),
        *halves(x + 150, 334, 130, 28, "A"),
        *halves(x + 316, 311, 34, 74, "B", rows=True),
    ]
    return drawn


def arrow_head(name: str, colour: str) -> str:
    return (
        f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="6" markerHeight="6"'
        f' orient="auto-start-reverse"><path d="M 0 0 L 10 5 L 0 10 z" fill="{colour}"/></marker>'
    )


def legend(y: float) -> list[str]:
    """Return the SVG elements of the legend, which explains the colours."""
    drawn, x = [], 250.0
    for colour, words in ((RANKS[0], "tensor rank 0"), (RANKS[1], "tensor rank 1"), (BOTH, "a copy on both")):
        drawn += [
            rect(x, y - 13, 16, 16, colour, radius=0),
            text(x + 24, y, words, size=15, fill=FAINT, anchor="start"),
        ]
        x += 160
    return drawn


def picture() -> str:
    left, right, middle = MARGIN, MARGIN + PANEL + GAP, WIDTH / 2
    start, end, both = left + PANEL, right, ' marker-start="url(#tie)" marker-end="url(#tie)"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
        ' font-family="Helvetica, Arial, sans-serif" role="img">',
        "<title>Two pipeline stages hold the same pair A, B, and sum its gradients</title>",
        f"<defs>{arrow_head('ink', INK)}{arrow_head('tie', TIE)}</defs>",
        rect(0.5, 0.5, WIDTH - 1, HEIGHT - 1, PAPER, radius=12),
        text(middle, 40, "z = W x + (α / r) · diag(v) B diag(u) A x", size=20),
        *stage(left, 0, (1, 2, 16)),
        *stage(right, 1, (17, 18, 32)),
        text(middle, 156, "activations", size=15, fill=FAINT),
        path(f"M {start + 6} 168 H {end - 7}"),
        path(f"M {end - 6} 192 H {start + 7}"),
        text(middle, 212, "gradients", size=15, fill=FAINT),
        text(middle, 318, "all-reduce", size=17, fill=TIE, style=' font-weight="bold"'),
        path(f"M {start - 8} 348 H {end + 8}", colour=TIE, width=5, ends=both),
        text(middle, 378, "grad A, grad B", fill=TIE),
        text(middle, 436, "Each step sums the gradients of A and B over the stages; the copies stay equal bit by bit."),
        *legend(466),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
