"""Draw docs/slots.svg, the picture in docs/serving.md. Run `python docs/draw_slots.py` to write the file.

A pair of bars is the memory of one adapter in vLLM, tied and expanded, from the same function as the server's. Pairs
have different scales: an expanded slot always has the full width.
"""

from pathlib import Path

from draw_tie import FAINT, PAPER, RANKS, TIE, rect, text

from megatron_tiedlora.base.messages import bytes_in_words
from megatron_tiedlora.base.presets import PRESETS
from megatron_tiedlora.base.shapes import TARGET_NAMES
from megatron_tiedlora.convert.serving import slot_bytes
from megatron_tiedlora.model.families import shape_from_hf

PICTURE = Path(__file__).with_name("slots.svg")
WIDTH, LEFT, ROW, TOP, FULL = 960, 220, 62, 76, 600
# The rows of the table in docs/serving.md: label, preset, targets and rank.
CASES = [
    (f"{model}, {label}, rank {rank}", f"llama2-{model.lower()}", targets, rank)
    for model in ("7B", "70B")
    for label, targets, rank in (("qkv", ("qkv",), 8), ("all linears", TARGET_NAMES, 8), ("qkv", ("qkv",), 64))
]


def sizes(preset: str, targets: tuple[str, ...], rank: int) -> tuple[int, int]:
    """Return the bytes of a tied and of an expanded slot."""
    shape = shape_from_hf(PRESETS[preset])
    linears = [shape.block.adaptable[name] for name in targets]
    tied, expanded = (slot_bytes(linears, rank, shape.num_layers, tied=is_tied) for is_tied in (True, False))
    return tied, expanded


def picture() -> str:
    height = TOP + ROW * len(CASES) + 16
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
        ' font-family="Helvetica, Arial, sans-serif" role="img">',
        "<title>Bytes of a slot, tied and expanded</title>",
        rect(0.5, 0.5, WIDTH - 1, height - 1, PAPER, radius=12),
        text(WIDTH / 2, 32, "GPU memory of one adapter", size=18),
    ]
    for x, colour, words in ((LEFT, TIE, "tied slot"), (LEFT + 130, RANKS[0], "expanded slot, as of an exported LoRA")):
        lines += [rect(x, 46, 16, 16, colour), text(x + 24, 59, words, size=15, fill=FAINT, anchor="start")]
    for number, (label, *case) in enumerate(CASES):
        y, (tied, expanded) = TOP + ROW * number, sizes(*case)
        lines.append(text(LEFT - 14, y + 32, label, anchor="end"))
        said = f"{bytes_in_words(tied)}, {expanded / tied:.0f} times less"
        bars = (tied, TIE, 4, said), (expanded, RANKS[0], 27, bytes_in_words(expanded))
        for size, colour, down, words in bars:
            length = round(FULL * size / expanded, 1)
            lines.append(rect(LEFT, y + down, length, 21, colour, radius=0))
            lines.append(text(LEFT + length + 8, y + down + 16, words, size=14, anchor="start"))
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
