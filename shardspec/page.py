"""A plan as one HTML page: what `print(plan)` says, with pictures. No script; colours for light and for dark."""

from collections.abc import Iterable, Sequence
from html import escape

from attrs import frozen

from shardspec.picture import captions, cuts_of, draw_layout, draw_mesh, draw_param
from shardspec.plan import Plan
from shardspec.summary import (
    PHASES,
    activation_rows,
    by_block,
    collective_rows,
    facts,
    length_text,
    mesh_text,
    param_rows,
    place_of,
    shape_text,
    size_text,
    stored_bytes,
    tied_to,
    volumes,
)

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1c2128; --dim: #5b6570; --line: #d5dae0; --head: #f4f6f8;
  --own: #1f6feb; --read: #a9cbf8; --other: #eef1f4; --edge: #8b96a3; --on: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --page: #14181d; --ink: #e3e8ee; --dim: #9aa5b1; --line: #333b45;
  --head: #1d232a; --own: #4c93f5; --read: #28456f; --other: #232a32; --edge: #66717e; --on: #0b0e12; } }
body { margin: 2rem auto; padding: 0 1.5rem; max-width: 76rem; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 1rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p { margin: .4rem 0; color: var(--dim); } .scroll { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: .35rem .9rem .35rem 0; text-align: left; vertical-align: middle; }
th { font-weight: 600; color: var(--dim); white-space: nowrap; border-bottom: 1px solid var(--line); }
td { border-bottom: 1px solid var(--line); } .number { text-align: right; white-space: nowrap; }
.facts td, .facts th { border: 0; padding-top: .1rem; padding-bottom: .1rem; }
tr.block td { background: var(--head); font-weight: 600; padding-left: .4rem; } td.below { padding-left: 1.4rem; }
code { font: 13px/1.4 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: nowrap; }
code.rule { white-space: normal; overflow-wrap: anywhere; } small { color: var(--dim); white-space: nowrap; }
svg { display: block; } svg.key { display: inline-block; vertical-align: -2px; margin: 0 .35rem 0 0; }
.key + span { margin-right: 1.2rem; }
rect { stroke: var(--edge); stroke-width: .8; } .own { fill: var(--own); } .read { fill: var(--read); }
.other { fill: var(--other); } .gap { fill-opacity: .4; stroke-dasharray: 2 2; } .frame { fill: none; }
text { fill: var(--ink); font: 12px ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
text.axis { fill: var(--dim); } .own + text { fill: var(--on); }
"""


@frozen
class Cell:
    """A cell's markup, made of escaped text, and its class."""

    markup: str
    kind: str = ""

    def __str__(self) -> str:
        return f'<td class="{self.kind}">{self.markup}</td>' if self.kind else f"<td>{self.markup}</td>"


def page(plan: Plan) -> str:
    """The plan as a page of its own; equal plans are equal pages."""
    title = escape(f"plan for {mesh_text(plan)}")
    parts = [_facts(plan), _mesh(plan), _parameters(plan), _activations(plan)]
    if plan.collectives:
        parts += [_collectives(plan), _volumes(plan)]
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _facts(plan: Plan) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in facts(plan).items())
    return f'<table class="facts">{rows}</table>'


def _mesh(plan: Plan) -> str:
    return f'<h2>mesh</h2>\n<div class="scroll">{draw_mesh(plan.mesh)}</div>'


def _key() -> str:
    entries = (("own", "what rank 0 stores"), ("read", "what it gathers for compute"), ("other", "other ranks'"))
    box = '<rect class="{}" x="1" y="1" width="12" height="12"/>'
    swatch = f'<svg class="key" width="14" height="14">{box}</svg><span>{{}}</span>'
    keys = "".join(swatch.format(kind, escape(text)) for kind, text in entries)
    words = "Dim 0 goes down, the others, or a single one, to the right. Not to scale: an axis above 4 shows a gap."
    return f"<p>{words}</p><p>{keys}</p>"


def _parameters(plan: Plan) -> str:
    rows: list[str] = []
    for block, members in by_block(param_rows(plan)).items():
        rows += _block(block, 7)
        for row in members:
            param, tied = row.plan, tied_to(row.first, row.plan)
            name = _code(row.name) + (f" <small>is {escape(tied)}</small>" if tied else "")
            rows.append(
                _row(
                    Cell(name, "below" if block else ""),
                    _number(str(row.count)),
                    Cell(f"{escape(shape_text(param.shape))} <small>{escape(param.dtype)}</small>"),
                    Cell(f"{_code(param.spec)}{_lines(captions(cuts_of(param), plan.mesh))}"),
                    Cell(draw_param(param, plan.mesh)),
                    _number(shape_text(param.local_shape) + ("" if tied else f", {size_text(stored_bytes(param))}")),
                    Cell(escape(", ".join(param.owed))),
                )
            )
    columns = ("name", "n>", "shape", "spec", "shards", "on a rank>", "gradient owed over")
    return f"<h2>parameters</h2>\n{_key()}\n{_table(columns, rows)}"


def _activations(plan: Plan) -> str:
    rows: list[str] = []
    for block, members in by_block(activation_rows(plan)).items():
        rows += _block(block, 6)
        for row in members:
            before = row.plan.before
            rows.append(
                _row(
                    Cell(_code(row.name or "(output)"), "below" if block else ""),
                    _number(str(row.count)),
                    Cell(_code(str(before)) if before else ""),
                    Cell(_code(str(row.plan.layout))),
                    Cell(draw_layout(row.plan.layout, plan.mesh)),
                    Cell(_rule(row.plan.rule)),
                )
            )
    return f"<h2>declared activations</h2>\n{_table(('name', 'n>', 'arrives', 'leaves', 'shards', 'rule'), rows)}"


def _collectives(plan: Plan) -> str:
    rows = [
        _row(
            Cell(escape(row.phase)),
            Cell(_code(row.kind)),
            Cell(_code(",".join(row.axes))),
            Cell(_code(place_of(row))),
            _number(str(row.count)),
            _number(length_text(row)),
            _number(size_text(row.total_bytes)),
            Cell(_rule(row.why)),
        )
        for row in collective_rows(plan)
    ]
    columns = ("phase", "kind", "axes", "where", "count>", "each>", "all>", "for")
    return f"<h2>collectives of a step</h2>\n{_table(columns, rows)}"


def _volumes(plan: Plan) -> str:
    found = volumes(plan)
    whole = {phase: sum(sizes[phase] for sizes in found.values()) for phase in PHASES}
    rows = [
        _row(
            Cell(_code(axes) if axes in found else escape(axes)),
            *(_number(size_text(sizes[phase])) for phase in PHASES),
            _number(size_text(sum(sizes.values()))),
        )
        for axes, sizes in [*found.items(), *([("all", whole)] if len(found) > 1 else [])]
    ]
    columns = ("axes", *(f"{phase}>" for phase in PHASES), "all>")
    return f"<h2>bytes of the messages of a step</h2>\n{_table(columns, rows)}"


def _block(block: str, columns: int) -> list[str]:
    return [f'<tr class="block"><td colspan="{columns}">{_code(block)}</td></tr>'] if block else []


def _row(*cells: Cell) -> str:
    return f"<tr>{''.join(map(str, cells))}</tr>"


def _number(text: str) -> Cell:
    return Cell(escape(text), "number")


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>" if text else ""


def _rule(text: str) -> str:
    return f'<code class="rule">{escape(text)}</code>'


def _lines(texts: Iterable[str]) -> str:
    return "".join(f"<br><small>{escape(text)}</small>" for text in texts)


def _table(columns: Sequence[str], rows: Iterable[str]) -> str:
    """A column whose name ends in `>` holds numbers."""
    heads = "".join(
        f'<th class="number">{escape(name[:-1])}</th>' if name.endswith(">") else f"<th>{escape(name)}</th>"
        for name in columns
    )
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
