"""What a unit is said to hold is what it holds; less room changes the order of work, no byte."""

import threading
import tracemalloc

import numpy as np
import pytest

from lfmq.converter.checkpoint.checkpoint import open_checkpoint
from lfmq.converter.jobs.execution import Execution
from lfmq.converter.jobs.memory import group_bytes, largest_group, parse_bytes, peak_resident
from lfmq.converter.plan.plan import resolve_plan
from lfmq.converter.plan.recipe import load_recipe, parse_recipe
from lfmq.converter.quantize.rtn import nearest_groups, quantize_entry
from lfmq.converter.run.convert import convert
from lfmq.converter.run.planned import plan_builds
from lfmq.formats.registry import FORMATS
from lfmq.formats.writing.writer import BuildWriter
from lfmq.quant.errors import RecipeError
from lfmq.quant.types import rows_of

FLOATS = """
[[rule]]
float = "float16"

[[rule]]
roles = ["experts"]
bits = 4
group = 32
"""

K_QUANTS = """
[[rule]]
bits = 4
grid = "kquant"

[[rule]]
roles = ["attention", "embedding"]
bits = 6
grid = "kquant"
"""
RECIPES = {"floats": FLOATS, "k-quants": K_QUANTS}


@pytest.fixture(scope="module")
def sample(sample_folder):
    return open_checkpoint(sample_folder)


def layouts(checkpoint, plan):
    """Of all formats that hold the plan."""
    planned = plan_builds(checkpoint, plan, FORMATS)
    return {
        b.format: FORMATS[b.format].layout(plan, checkpoint.assets)
        for b in planned
        if b.refused is None
    }


@pytest.mark.parametrize("name", ["int4", "int8", "int4-all", *RECIPES])
def test_a_unit_holds_no_more_than_it_is_said_to(sample, tmp_path, monkeypatch, name):
    for module in ("converter.quantize.rtn", "converter.jobs.memory", "formats.writing.filler"):
        monkeypatch.setattr(f"lfmq.{module}.SLAB", 2**18)
    recipe = parse_recipe(RECIPES[name], name, name) if name in RECIPES else load_recipe(name)
    plan = resolve_plan(sample.config, recipe)
    kinds = {e.storage: unit for unit in plan.write_groups() for e in unit}
    for format_name, layout in layouts(sample, plan).items():
        with BuildWriter(tmp_path / "first", layout) as writer:  # kernels that pack are compiled
            for unit in {unit[0].name: unit for unit in kinds.values()}.values():
                writer.write({e.name: quantize_entry(sample, e) for e in unit})
        with BuildWriter(tmp_path / format_name, layout) as writer:
            for unit in plan.write_groups():
                if sum(e.size for e in unit) < 2**15:
                    continue  # Python's own objects outweigh it
                quantize_entry(sample, unit[0])  # compiled and loaded before it counts
                tracemalloc.start()
                writer.write({e.name: quantize_entry(sample, e) for e in unit})
                _, peak = tracemalloc.get_traced_memory()
                tracemalloc.stop()
                assert peak <= group_bytes(unit) + 2**17, (format_name, unit[0].name)


@pytest.mark.parametrize(
    ("recipe", "least"),
    [(load_recipe("int4"), 300), (parse_recipe(K_QUANTS, "k", "k"), 50)],
    ids=["int4", "k-quants"],
)
def test_runs_of_rows_pack_to_the_bytes_of_the_whole(sample, recipe, least):
    plan = resolve_plan(sample.config, recipe)
    entries = {e.name: e for e in plan.entries}
    checked = 0
    for layout in layouts(sample, plan).values():
        for segment in (p for file in layout.files for p in file.segments if p.by_rows):
            name = segment.sources[0]
            if ".experts." in name and not name.endswith(".experts.3.w2.weight"):
                continue
            weight = quantize_entry(sample, entries[name])
            cut = max(1, weight.shape[0] // 3)
            runs = [rows_of(weight, 0, cut), rows_of(weight, cut, weight.shape[0])]
            whole = segment.pack(weight)
            assert np.array_equal(whole, np.concatenate([segment.pack(run) for run in runs]))
            assert whole.nbytes == segment.nbytes
            checked += 1
    assert checked > least


def read_all(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_bytes_do_not_depend_on_the_memory(sample, tmp_path, monkeypatch):
    recipe = load_recipe("int4")
    plan = resolve_plan(sample.config, recipe)
    lines: list[str] = []
    convert(
        sample, recipe, plan, FORMATS, tmp_path / "much", execution=Execution(notice=lines.append)
    )
    assert lines == []
    for module in ("converter.quantize.rtn", "converter.jobs.memory", "formats.writing.filler"):
        monkeypatch.setattr(f"lfmq.{module}.SLAB", 2**14)
    execution = Execution(memory=1, notice=lines.append)
    convert(sample, recipe, plan, FORMATS, tmp_path / "little", execution=execution)
    (line,) = lines
    assert line.startswith(f"memory: {largest_group(plan)[0].name} alone takes up to ")
    assert read_all(tmp_path / "much") == read_all(tmp_path / "little")


def test_units_in_work_fit_the_headroom(sample):
    plan = resolve_plan(sample.config, load_recipe("int4"))
    by_name = {unit[0].name: group_bytes(unit) for unit in plan.write_groups()}
    lock, held, most = threading.Lock(), [0], [0]

    def write(weights):
        with lock:
            held[0] += by_name[next(iter(weights))]
            most[0] = max(most[0], held[0])
        with lock:
            held[0] -= by_name[next(iter(weights))]

    headroom, execution = max(by_name.values()), Execution(threads=4)
    units = nearest_groups(sample, plan, write, headroom=headroom, execution=execution)
    assert len(list(units)) == len(by_name)
    assert most[0] <= headroom


def test_sizes():
    assert [parse_bytes(t) for t in ("2GB", "5800MiB", " 1.5 kb", "12")] == [
        2_000_000_000, 5800 * 2**20, 1500, 12,
    ]  # fmt: skip
    for text in ("", "0", "-1GB", "2 potatoes", "5bpw", "GB"):
        with pytest.raises(RecipeError, match="expected bytes"):
            parse_bytes(text)
    assert peak_resident() > 2**24
