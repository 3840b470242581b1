"""`edgefm bench`."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Annotated, Any

import typer

from ...edge.machine import machine_state
from ...models.errors import ConfigError, EdgeFMError
from ...models.students import DEFAULT_STUDENT, INT8_SUFFIX, PROFILES
from .options import check_sources, extra

Weights = Annotated[
    Path | None, typer.Option(help="A GGUF file or a directory of safetensors. [smollm2, once it has been fetched]")
]
Device = Annotated[str, typer.Option(help="cpu or cuda: where PyTorch computes.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the results here.")]


def _chosen(weights: Path | None) -> Path:
    from ..weights import found_weights

    return found_weights("smollm2") if weights is None else weights


def _measured(measure: Callable[[], dict[str, Any]], json_file: Path | None) -> None:
    """Runs it; a folder that its results cannot go to is an error before the measurement, not minutes later.

    The results say how busy the machine was before: what shared it with others reads as such.
    """
    from ..bench.results import make_folder, save

    if json_file is not None:
        make_folder(json_file)
    before = machine_state()
    try:
        result = {**measure(), "machine_before": before}
    except BrokenProcessPool as error:
        raise EdgeFMError("a process of the measurement was ended from outside; is the memory enough?") from error
    if json_file is not None:
        save(result, json_file)


def students(
    data: Annotated[Path, typer.Option(help="Folder or tar laid out train/<label>/, val/<label>/.")],
    samples: Annotated[int, typer.Option(help="Samples that the FM labels.")] = 1600,
    head_only: Annotated[bool, typer.Option("--head-only", help="The tail is not trained.")] = False,
    seed: Annotated[int, typer.Option(help="Which samples those are.")] = 0,
    json_file: JsonFile = None,
) -> None:
    """Every student: milliseconds a frame, accuracy before and after customization, seconds to publish."""
    check_sources([data])
    with extra("demo"):
        from rich.console import Console

        from ..bench.students import bench_students
    _measured(lambda: bench_students(data, samples, seed, Console(), head_only), json_file)


def learning(
    data: Annotated[list[Path], typer.Option(help="Folders or tars laid out train/<label>/, val/<label>/.")],
    student: Annotated[str, typer.Option(help="Which student.")] = DEFAULT_STUDENT,
    samples: Annotated[
        str, typer.Option(help="Numbers of samples that the FM labels; 0 is version 0.")
    ] = "0,100,400,1600",
    seeds: Annotated[int, typer.Option(help="Repeats, each with other samples.")] = 5,
    accuracy_target: Annotated[float, typer.Option(help="Accuracy to keep, of the FM's.")] = 0.99,
    json_file: JsonFile = None,
) -> None:
    """Edge share against samples, clean and by night, blurred, noisy, compressed. About an hour on 2 cores."""
    check_sources(data)
    with extra("demo"):
        from rich.console import Console

        from ..bench.learning import bench_learning
    counts = _counts("samples", samples, 0)
    if seeds < 1:
        raise ConfigError(f"--seeds must be at least 1, got {seeds}")
    _measured(lambda: bench_learning(data, student, counts, seeds, accuracy_target, Console()), json_file)


def returning(
    data: Annotated[list[Path], typer.Option(help="Folders or tars laid out train/<label>/, val/<label>/.")],
    student: Annotated[str, typer.Option(help="Which student.")] = DEFAULT_STUDENT,
    samples: Annotated[int, typer.Option(help="Samples that the FM labels by day, and again by night.")] = 1000,
    seeds: Annotated[int, typer.Option(help="Repeats, each with other samples.")] = 5,
    accuracy_target: Annotated[float, typer.Option(help="Accuracy to keep, of the FM's.")] = 0.99,
    json_file: JsonFile = None,
) -> None:
    """What a student still knows of the day when the day returns after the night."""
    check_sources(data)
    with extra("demo"):
        from rich.console import Console

        from ..bench.returning import bench_returning
    if min(samples, seeds) < 1:
        raise ConfigError(f"--samples and --seeds must be at least 1, got {samples} and {seeds}")
    _measured(lambda: bench_returning(data, student, samples, seeds, accuracy_target, Console()), json_file)


def easy(
    data: Annotated[list[Path], typer.Option(help="Folders or tars laid out train/<label>/, val/<label>/.")],
    conditions: Annotated[str, typer.Option(help="clean, night, blur, noise, jpeg20; separated by commas.")] = "clean",
    student: Annotated[str, typer.Option(help="Which student.")] = DEFAULT_STUDENT,
    samples: Annotated[int, typer.Option(help="Samples that the FM labels.")] = 400,
    seen: Annotated[int, typer.Option(help="Samples beside them; the easy ones are among these.")] = 800,
    seeds: Annotated[int, typer.Option(help="Repeats, each with other samples.")] = 5,
    accuracy_target: Annotated[float, typer.Option(help="Accuracy to keep, of the FM's.")] = 0.99,
    json_file: JsonFile = None,
) -> None:
    """What samples that the student found easy teach, by its own word and by the FM's."""
    check_sources(data)
    with extra("demo"):
        from rich.console import Console

        from ..bench.easy import bench_easy
        from ..conditions import CONDITIONS
    if min(samples, seen, seeds) < 1:
        raise ConfigError(f"--samples, --seen and --seeds must be at least 1, got {samples}, {seen} and {seeds}")
    names = tuple(name.strip() for name in conditions.split(","))
    if unknown := [name for name in names if name not in CONDITIONS]:
        raise ConfigError(f"--conditions are among {', '.join(CONDITIONS)}; got {unknown[0]!r}")
    _measured(lambda: bench_easy(data, names, student, samples, seen, seeds, accuracy_target, Console()), json_file)


def agent(
    students: Annotated[str, typer.Option(help="Which, separated by commas.")] = ",".join(
        name for name in PROFILES if not name.endswith(INT8_SUFFIX)
    ),
    rounds: Annotated[int, typer.Option(help="How often each of the 30 frames is answered.")] = 40,
    seed: Annotated[int, typer.Option(help="Which frames those are.")] = 0,
    json_file: JsonFile = None,
) -> None:
    """What the agent adds around the bare ONNX session, per frame that the edge answers. About 2 minutes on 2 cores."""
    with extra("demo"):
        from rich.console import Console

        from ..bench.agent import bench_agent
    if rounds < 1:
        raise ConfigError(f"--rounds must be at least 1, got {rounds}")
    names = [name.strip() for name in students.split(",")]
    _measured(lambda: bench_agent(names, rounds, seed, Console()), json_file)


def service(
    clients: Annotated[str, typer.Option(help="Numbers of concurrent clients.")] = "1,8,64",
    repeats: Annotated[int, typer.Option(help="How often all is measured; medians are reported.")] = 7,
    seconds: Annotated[float, typer.Option(help="Of each measurement, after one second to warm up.")] = 3.0,
    seed: Annotated[int, typer.Option(help="Which pictures are sent.")] = 0,
    fm: Annotated[str, typer.Option(help="The foundation model, as `edgefm cloud --fm` takes it.")] = "synclip",
    json_file: JsonFile = None,
) -> None:
    """Requests a second and latency of the cloud, of LitServe with the same FM, and of the FM alone. About 9 minutes."""
    with extra("bench"):
        from rich.console import Console

        from ..bench.service import ServiceOptions, bench_service
    options = ServiceOptions(_counts("clients", clients, 1), repeats=repeats, seconds=seconds, seed=seed, fm=fm)
    _measured(lambda: bench_service(options, Console()), json_file)


def memory(
    requests: Annotated[int, typer.Option(help="How many the cloud answers.")] = 100_000,
    keep: Annotated[bool, typer.Option(help="It stores the samples, each of them new.")] = False,
    seed: Annotated[int, typer.Option(help="Which pictures are sent.")] = 0,
    json_file: JsonFile = None,
) -> None:
    """The cloud's memory over many requests. About 6 minutes for 100,000 on 2 cores."""
    with extra("demo"):
        from rich.console import Console

        from ..bench.memory import SAMPLES, bench_memory
    if requests < SAMPLES:
        raise ConfigError(f"--requests must be at least {SAMPLES}, got {requests}")
    _measured(lambda: bench_memory(requests, keep, seed, Console()), json_file)


def link(
    repeats: Annotated[int, typer.Option(help="Interleaved; the median counts.", min=1)] = 7,
    json_file: JsonFile = None,
) -> None:
    """What the link shaper of demo and live replay costs beside the link that it plays."""
    with extra("demo"):
        from rich.console import Console

        from ..bench.link import bench_link
    _measured(lambda: bench_link(repeats, Console()), json_file)


def attention(
    tokens: Annotated[str, typer.Option(help="Lengths of the sequence.")] = "512,1024,4096,16384",
    repeats: Annotated[int, typer.Option(help="Interleaved; the median counts.", min=1)] = 3,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, of queries, keys and values.")] = "float32",
    json_file: JsonFile = None,
) -> None:
    """Every variant of attention, fused and eager, beside PyTorch's own: time and memory. Some ten minutes on a CPU."""
    with extra("cloud"):
        from rich.console import Console

        from ..bench.attention import DTYPES, Place, bench_attention
        from ..bench.devices import chosen
    counts = _counts("tokens", tokens, 1)
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype is {' or '.join(DTYPES)}, got {dtype!r}")
    place = Place(chosen(device), DTYPES[dtype])
    _measured(lambda: bench_attention(counts, repeats, Console(), place), json_file)


def language(
    weights: Weights = None,
    repeats: Annotated[int, typer.Option(help="Interleaved; the median counts.", min=1)] = 5,
    json_file: JsonFile = None,
) -> None:
    """The language model beside transformers' on the same weights: prefill, decoding, loading, memory."""
    path = _chosen(weights)
    with extra("cloud"):
        from rich.console import Console

        from ..bench.language import bench_language
    _measured(lambda: bench_language(path, repeats, Console()), json_file)


def labels(
    data: Annotated[list[Path], typer.Option(help="The archives tiny-imagenet-wild.tar and tiny-imagenet-town.tar.")],
    weights: Weights = None,
    earlier: Annotated[
        Path | None, typer.Option(help="Results of an earlier run: its descriptions are scored, none are written.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """The FM's accuracy on labels alone, on labels that the language model describes, and on controls. 20 minutes."""
    check_sources(data)
    path = _chosen(weights)
    with extra("demo"):
        from rich.console import Console

        from ..bench.labels import bench_labels
    _measured(lambda: bench_labels(data, path, earlier, Console()), json_file)


def ranking(
    data: Annotated[list[Path], typer.Option(help="Folders or tars laid out train/<label>/, val/<label>/.")],
    labels: Annotated[
        int, typer.Option(help="Of a place; where the data has more, every seed draws that many.", min=2)
    ] = 20,
    seeds: Annotated[int, typer.Option(help="Repeats, each of another place.", min=1)] = 12,
    weights: Weights = None,
    json_file: JsonFile = None,
) -> None:
    """What counting a place's answers, and the language model's opinion, add to the FM where it is least sure."""
    check_sources(data)
    path = _chosen(weights)
    with extra("demo"):
        from rich.console import Console

        from ..bench.ranking import bench_ranking
    _measured(lambda: bench_ranking(data, path, labels, seeds, Console()), json_file)


def scheduling(
    lengths: Annotated[Path, typer.Option(help="JSON list of objects with answers' lengths: L_t0.0, L_t0.3, ...")],
    questions: Annotated[
        Path | None,
        typer.Option(help="JSON Lines with a question each, to answer live. [none: recorded lengths alone]"),
    ] = None,
    requests: Annotated[int, typer.Option(help="Of the recorded ones.", min=1)] = 1024,
    live: Annotated[int, typer.Option(help="Questions answered under every policy.", min=1)] = 48,
    history: Annotated[
        int, typer.Option(help="Questions before them, whose answers' lengths are learned.", min=1)
    ] = 48,
    weights: Weights = None,
    precision: Annotated[str, typer.Option(help="float32, bfloat16 or quantised.")] = "quantised",
    json_file: JsonFile = None,
) -> None:
    """The language model's requests per second: static batches, sequence scheduling, continuous batching. Minutes."""
    if precision not in ("float32", "bfloat16", "quantised"):
        raise ConfigError(f"--precision is float32, bfloat16 or quantised, got {precision!r}")
    path = _chosen(weights)
    with extra("cloud"):
        from rich.console import Console

        from ..bench.scheduling import bench_scheduling
    _measured(
        lambda: bench_scheduling(path, lengths, questions, requests, live, history, precision, Console()), json_file
    )


def sepllm(
    books: Annotated[Path, typer.Option(help="A tar of .txt files, PG-19's.")],
    questions: Annotated[Path, typer.Option(help="A JSON object a line, question and answer, GSM8K's.")],
    weights: Weights = None,
    post_train: Annotated[
        int, typer.Option(help="Tokens of other books that the model learns from under each mask. [none]", min=0)
    ] = 0,
    batch: Annotated[int, typer.Option(help="Windows of 2,048 tokens in a step of training.", min=1)] = 2,
    device: Device = "cpu",
    minutes: Annotated[
        float | None, typer.Option(help="Nothing more begins after so many; the same command again goes on. [no limit]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of books, windows, random tokens and questions.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Draw perplexity against shares into this .png or .svg.")] = None,
    json_file: JsonFile = None,
) -> None:
    """SepLLM on books and questions at equal key-value shares, before and after training, and on a long stream. Hours on a CPU.

    Streams and answers are always the CPU's. With --json FILE, what is measured is kept in FILE.partial as it comes.
    """
    path = _chosen(weights)
    with extra("demo"):
        from rich.console import Console

        from ..bench.devices import chosen
        from ..bench.sepllm import bench_sepllm
        from ..bench.sepllm_picture import save_picture
        from ..bench.sepllm_training import PostTraining
        from ..traces.picture import check_picture_name
    if plot is not None:
        check_picture_name(plot)
    where, training = chosen(device), PostTraining(post_train, batch) if post_train else None
    partial = None if json_file is None else json_file.with_name(f"{json_file.name}.partial")

    def measure() -> dict[str, Any]:
        result = bench_sepllm(path, books, questions, training, where, minutes, seed, partial, Console())
        if plot is not None:
            save_picture(result, plot)
        return result

    _measured(measure, json_file)


def _counts(name: str, text: str, least: int) -> tuple[int, ...]:
    """Ascending numbers from a flag's comma-separated text."""
    try:
        counts = sorted({int(count) for count in text.split(",")})
    except ValueError:
        raise ConfigError(f"--{name} is a list of numbers such as 1,10,100, got {text!r}") from None
    if counts[0] < least:
        raise ConfigError(f"--{name} are at least {least}, got {counts[0]}")
    return tuple(counts)


def soak(
    minutes: Annotated[
        float, typer.Option(help="How long things go wrong; starting and calming down come on top.")
    ] = 10,
    seed: Annotated[int, typer.Option(help="Of frames, links, faults and their order; not of the timing.")] = 0,
    json_file: JsonFile = None,
) -> None:
    """A cloud and four agents through kills, cuts, full disks, damaged models and mutated requests, all at once.

    Fails, with exit code 1, if a frame is lost or answered twice, a sample is lost, or something does not come back.
    """
    with extra("demo"):
        from rich.console import Console

        from ..bench.soak import bench_soak
    broken: list[str] = []

    def measure() -> dict[str, Any]:
        result = bench_soak(minutes, seed, Console())
        broken.extend(result["broken"])
        return result

    _measured(measure, json_file)
    if broken:
        raise EdgeFMError(f"{len(broken)} promises did not hold; the first: {broken[0]}")
