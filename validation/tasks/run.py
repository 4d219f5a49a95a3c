"""What a build writes when it is asked: the tasks of a file, answered by reference and build.

Both answer every task twice, once greedy and once as the model card samples, with the same random
numbers; the figures of docs/generation.md say how the answers differ. The reference answers once
for all builds.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from lfmq.converter.checkpoint.checkpoint import Checkpoint
from lfmq.converter.jobs.execution import Execution
from lfmq.converter.model.decode import Decoder, KeptModel, sequence_nbytes
from lfmq.converter.model.forward import Model
from lfmq.converter.model.tokenizer import load_tokenizer
from lfmq.quant.errors import ValidationError
from lfmq.validation.measure.builds import open_builds
from lfmq.validation.measure.generation import GenerationFigures
from lfmq.validation.measure.report import Report
from lfmq.validation.tasks.figures import Answer, Figures
from lfmq.validation.tasks.repeats import find_repeats
from lfmq.validation.tasks.sampling import Sampling, card_sampling, draws, sample, stop_tokens
from lfmq.validation.tasks.tasks import Tasks, has_thought, judge, load_tasks

# Bytes of keys, values and logits held at a time.
_STATE_BYTES = 2**31


@dataclass(frozen=True, slots=True)
class Checks:
    """Everything that both models are given.

    Attributes:
        tasks: what is asked.
        tokenizer: the checkpoint's, to read the answers.
        sampling: of the sampled answers.
        stop: tokens that end an answer.
        new_tokens: most tokens of an answer.
        runs: sampled answers to each task.
        seed: of the random numbers.
    """

    tasks: Tasks
    tokenizer: Tokenizer
    sampling: Sampling
    stop: frozenset[int]
    new_tokens: int = 256
    runs: int = 1
    seed: int = 0


def prepare_checks(
    checkpoint: Checkpoint,
    path: Path,
    *,
    count: int | None = None,
    new_tokens: int = 256,
    runs: int = 1,
) -> Checks:
    """Read tasks, sampling settings and stop tokens; runs no model.

    Raises:
        ValidationError: a bad file, or prompt and answer do not fit the model's context.
    """
    assets, config = checkpoint.assets, checkpoint.config
    tasks = load_tasks(path, assets, config, count=count)
    longest, context = max(len(t.prompt) for t in tasks.tasks), config.max_position_embeddings
    if longest + new_tokens > context:
        raise ValidationError(
            f"{path}: the longest prompt of {longest} tokens and --new-tokens {new_tokens} exceed "
            f"the model's context of {context} tokens; use fewer"
        )
    stop = stop_tokens(assets, config)
    return Checks(tasks, load_tokenizer(assets), card_sampling(assets), stop, new_tokens, runs)


@dataclass(frozen=True, slots=True)
class Generation:
    """A build's answers against the reference's."""

    greedy: Figures
    sampled: Figures

    def summary(self) -> dict[str, GenerationFigures]:
        """The figures of both modes, as a report has them."""
        return {"greedy": self.greedy.summary(), "sampled": self.sampled.summary()}


def check_builds(
    checkpoint: Checkpoint,
    paths: Iterable[Path],
    checks: Checks,
    *,
    allow_other: bool = False,
    execution: Execution = Execution(),
) -> dict[Path, Generation]:
    """Have the checkpoint and finished builds do the tasks.

    Args:
        checkpoint: the reference.
        paths: builds of any format.
        checks: what is asked, and how.
        allow_other: also builds of other checkpoints.
        execution: the device, and whom to tell of answers.

    Raises:
        ValidationError: a build cannot be read or is of another model.
    """
    paths = tuple(dict.fromkeys(paths))
    opened = open_builds(paths, ("read",), checkpoint, allow_other=allow_other)
    builds = (build.model(execution.device) for build in opened)
    reference = Model(checkpoint.config, checkpoint.read, device=execution.device)
    total = (1 + len(paths)) * len(checks.tasks.tasks) * (1 + checks.runs)
    report = execution.counter("generating", "answer")
    found = compare_models(reference, builds, checks, lambda done: report(done, total))
    return dict(zip(paths, found, strict=True))


def with_generation(report: Report, found: Mapping[Path, Generation]) -> Report:
    """A report whose first row of each build tells what the build wrote."""
    rows, left = [], {str(path): generation.summary() for path, generation in found.items()}
    for build in report.builds:
        rows.append(replace(build, generation=left.pop(build.path, None)))
    return replace(report, builds=tuple(rows))


def compare_models(
    reference: Model,
    builds: Iterable[Model],
    checks: Checks,
    advance: Callable[[int], None] | None = None,
) -> Iterator[Generation]:
    """Have models do the tasks, one in memory at a time.

    Args:
        reference: what the others are compared with.
        builds: the others.
        checks: what is asked, and how.
        advance: called with the number of answers that just ended.
    """
    expected = _answer_twice(reference, checks, advance)
    for build in builds:
        found = _answer_twice(build, checks, advance)
        common = (checks.tasks.sha256, checks.new_tokens)
        yield Generation(
            Figures(expected[0], found[0], 1, *common, None),
            Figures(expected[1], found[1], checks.runs, *common, checks.sampling),
        )


def _answer_twice(
    model: Model, checks: Checks, advance: Callable[[int], None] | None
) -> tuple[list[Answer], list[Answer]]:
    """Greedy answers and sampled ones."""
    kept = KeptModel(model.config, model.read, model.dtype, model.device)
    return (
        answer_tasks(kept, checks, sampling=None, advance=advance),
        answer_tasks(kept, checks, sampling=checks.sampling, advance=advance),
    )


def answer_tasks(
    model: Model,
    checks: Checks,
    *,
    sampling: Sampling | None,
    advance: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Every task's answers, judged: one greedy without ``sampling``, else ``checks.runs`` each."""
    tasks = checks.tasks.tasks
    runs = 1 if sampling is None else checks.runs
    asked = [(task, run) for task in range(len(tasks)) for run in range(runs)]
    longest = max(len(t.prompt) for t in tasks) + checks.new_tokens
    at_once = max(1, _STATE_BYTES // sequence_nbytes(model.config, longest))
    written: list[NDArray[np.int64]] = []
    for start in range(0, len(asked), at_once):
        part = asked[start : start + at_once]
        draw = [draws(checks.seed, task, run, checks.new_tokens) for task, run in part]
        prompts = [tasks[task].prompt for task, _ in part]
        written += write_answers(model, prompts, checks, sampling, np.stack(draw), advance)
    return [
        _judged(checks, task, tokens) for (task, _), tokens in zip(asked, written, strict=True)
    ]


def write_answers(
    model: Model,
    prompts: Sequence[NDArray[np.int64]],
    checks: Checks,
    sampling: Sampling | None,
    uniform: NDArray[np.float64],
    advance: Callable[[int], None] | None = None,
) -> list[NDArray[np.int64]]:
    """The tokens a model writes after each prompt, the one that ends them included.

    Args:
        model: weights.
        prompts: token ids.
        checks: the stop tokens and the most tokens to write.
        sampling: None for the most likely token.
        uniform: [W, new tokens], the numbers that sampling draws with.
        advance: called with the number of answers that just ended.
    """
    written: list[list[int]] = [[] for _ in prompts]
    active = np.arange(len(prompts))
    decoder = Decoder(model)
    logits = decoder.start(prompts)
    seen = _seen(prompts, logits)
    for step in range(checks.new_tokens):
        if sampling is None:
            tokens = logits.argmax(-1).cpu().numpy()
        else:
            tokens = sample(logits, seen, sampling, uniform[active, step])
        for row, token in zip(active, tokens, strict=True):
            written[row].append(int(token))
        going = ~np.isin(tokens, list(checks.stop))
        if step + 1 == checks.new_tokens:
            going[:] = False
        if advance is not None and not going.all():
            advance(int((~going).sum()))
        if not going.any():
            break
        active, tokens = active[going], tokens[going]
        seen = seen[torch.from_numpy(going).to(seen.device)]
        seen[torch.arange(len(tokens)), torch.from_numpy(tokens).to(seen.device)] = True
        decoder.keep(going)
        logits = decoder.step(tokens)
    return [np.array(tokens, np.int64) for tokens in written]


def _seen(prompts: Sequence[NDArray[np.int64]], logits: torch.Tensor) -> torch.Tensor:
    seen = torch.zeros(logits.shape, dtype=torch.bool)
    for row, prompt in zip(seen, prompts, strict=True):
        row[torch.from_numpy(prompt)] = True
    return seen.to(logits.device)


def _judged(checks: Checks, task: int, tokens: NDArray[np.int64]) -> Answer:
    ended = int(tokens[-1]) in checks.stop
    words = tokens[:-1] if ended else tokens
    text = checks.tokenizer.decode(words.tolist(), skip_special_tokens=False)
    unfinished = not (checks.tasks.thinks and has_thought(text))
    asked = checks.tasks.tasks[task]
    return Answer(
        kind=asked.kind,
        tokens=tokens,
        text=text,
        verdict=judge(asked, text),
        capped=not ended and unfinished,
        repeats=find_repeats(words),
    )


def generation_lines(
    reports: Iterable[tuple[str, Mapping[str, GenerationFigures] | None]],
) -> Iterator[str]:
    """For each build (its path and figures by mode) the figures in a line for a terminal."""
    for path, found in reports:
        if found is not None:
            parts = "; ".join(f"{mode}: {_described(figures)}" for mode, figures in found.items())
            yield f"{Path(path).name}: {parts}"


def _described(figures: GenerationFigures) -> str:
    tools, answers = figures.tools, figures.answers
    parts = [
        _counted("tool calls", tools.n, tools.right_arguments, tools.reference_right_arguments),
        _counted("answers", answers.n, answers.accuracy, answers.reference_accuracy),
        f"same text {figures.same_text:.1%}",
        f"at the cap {figures.capped or 0:.1%}",
        f"looped {figures.looped or 0:.1%}",
        f"length x{figures.length_ratio:.2f}",
    ]
    return ", ".join(filter(None, parts))


def _counted(what: str, n: int, share: float | None, reference: float | None) -> str:
    """Empty without any such task."""
    if share is None or reference is None:
        return ""
    return f"{round(share * n)}/{n} {what} right (reference {round(reference * n)})"
