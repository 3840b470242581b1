"""`edgefm bench sepllm` on a tiny model: its parts, what they say of bad input, and that it goes on where it was cut short."""

from __future__ import annotations

import io
import json
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from edgefm.deploy.bench.books import read_books, shelve, windows
from edgefm.deploy.bench.cells import Cells
from edgefm.deploy.bench.questions import conversations, final, read_questions
from edgefm.deploy.bench.sepllm import bench_sepllm
from edgefm.deploy.bench.sepllm_masks import INITIAL, Mask, masks, seen, shares
from edgefm.deploy.bench.sepllm_material import Sizes
from edgefm.deploy.bench.sepllm_perplexity import ratio
from edgefm.deploy.bench.sepllm_picture import save_picture
from edgefm.deploy.bench.sepllm_training import PostTraining
from edgefm.models.attention.pattern import Pattern
from edgefm.models.errors import InputError
from edgefm.models.language.config import DecoderConfig
from edgefm.models.language.weights import names, save_directory
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

QUIET, CPU = Console(quiet=True), torch.device("cpu")
SIZES = Sizes((8, 16), 96, 2, 2, 48, 900, 450, 2, 1, 4)
TRAINING = PostTraining(96, 2)


def words(seed: int, count: int) -> str:
    random = np.random.default_rng(seed)
    return "\n\n".join(
        " ".join("abcdefgh"[i] * 3 for i in random.integers(0, 8, 9)) + ", and so on." for _ in range(count)
    )


def tar(path: Path, texts: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, text in texts.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    return path


@pytest.fixture(scope="module")
def books(tmp_path_factory) -> Path:
    texts = {f"{number}.txt": words(number, 60).encode() for number in range(4)}
    return tar(tmp_path_factory.mktemp("books") / "books.tar.gz", {**texts, "short.txt": b"Too short.\n\nIt is."})


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    lines = [
        {"question": f"{i} + {i}?", "answer": f"It is <<{i}+{i}={2 * i}>>{2 * i}.\n#### {2 * i}"} for i in range(5)
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = DecoderConfig(2, 64, 96, 4, 2, 16, 256, 1024, 10000.0, 1e-5, True)
    shapes = {"embed_tokens": (256, 64), "norm": (64,), "q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64)}
    shapes |= {
        "o_proj": (64, 64),
        "gate_proj": (96, 64),
        "up_proj": (96, 64),
        "down_proj": (64, 96),
        "layernorm": (64,),
    }
    torch.manual_seed(0)
    tensors = {
        name: 0.1 * torch.randn(next(shape for part, shape in shapes.items() if f"{part}.weight" in name))
        for name in names(config)
    }
    save_directory(folder, config, tensors)
    letters = Tokenizer(BPE({letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}, []))
    letters.pre_tokenizer, letters.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    letters.save(str(folder / "tokenizer.json"))
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
    (folder / "chat_template.jinja").write_text(template)
    return folder


def test_every_part_is_measured_and_a_second_run_goes_on(model: Path, books: Path, questions: Path, tmp_path: Path):
    partial = tmp_path / "parts"

    def run(minutes: float | None, seed: int = 0) -> dict:
        return bench_sepllm(model, books, questions, TRAINING, CPU, minutes, seed, partial, QUIET, SIZES)

    none = run(0.0)
    assert not none["complete"] and none["perplexity"] == [] == none["questions"] and none["post_training"] is None
    whole = run(None)
    assert whole["complete"]
    rows = {row["mask"]: row for row in whole["perplexity"]}
    assert list(rows) == [
        *("full", "sepllm n=8", "window, mean of n=8", "sepllm n=16", "window, mean of n=16"),
        *("random n=8", "random n=16", "window, peak of n=8", "window, peak of n=16"),
    ]
    for n in (8, 16):
        sepllm, mean, peak = rows[f"sepllm n={n}"], rows[f"window, mean of n={n}"], rows[f"window, peak of n={n}"]
        assert mean["mean_share"] == pytest.approx(sepllm["mean_share"], abs=0.01)
        assert peak["peak_share"] == pytest.approx(sepllm["peak_share"], abs=0.01)
        assert rows[f"random n={n}"]["mean_share"] == pytest.approx(sepllm["mean_share"], abs=0.05)
    assert all(row["windows"] == 4 and set(row["by_book"]) == set(whole["books"]) for row in rows.values())
    streams = [stream for name, stream in whole["streaming"].items() if name != "book"]
    assert [row["tokens"] for row in streams[0]["rows"]] == [450, 900] and streams[0]["peak_usage"] == 800
    assert {row["mask"] for row in whole["questions"]} == set(list(rows)[1:5])
    assert all(0 <= row["agreement"] <= 1 and row["tokens"] > 0 for row in whole["questions"])
    trained = whole["post_training"]
    assert trained["tokens"] == 96 and trained["rate"] in map(float, trained["swept"])
    assert [row["mask"] for row in trained["masks"]] == [*list(rows)[1:3], "full", *list(rows)[3:]]
    assert all(row["of_before"] and row["windows"] == 4 and len(row["losses"]) == 1 for row in trained["masks"])
    assert [set(row) & {"of_full", "of_sepllm"} for row in trained["masks"][:3]] == [
        *({"of_full"}, {"of_full", "of_sepllm"}, set())
    ]
    assert set(whole["devices"].values()) == {"cpu"} and set(whole["devices"]) == set(whole["seconds"])
    for kind, begins in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        save_picture(whole, tmp_path / f"sepllm.{kind}")
        assert (tmp_path / f"sepllm.{kind}").read_bytes().startswith(begins)
    again = run(0.0)
    assert {**again, "environment": None} == {**whole, "environment": None}
    with pytest.raises(InputError, match="other settings"):
        run(None, seed=1)


def test_shares_are_those_of_the_mask_itself():
    tokens = torch.randint(0, 50, (3, 40), generator=torch.Generator().manual_seed(0))
    separators = torch.arange(50) % 6 == 0
    for mask in masks([tokens], separators, (4, 9)):
        kept = mask.kept(tokens, separators, 1)
        whole = mask.pattern.mask(40, 40, kept)  # (B or 1, 40, 40)
        counts = seen(mask.pattern, 40, kept)
        assert torch.equal(counts, whole.sum(dim=2))
        mean, peak = shares([counts])
        assert mean == pytest.approx(float(whole.double().mean(dim=0).sum()) / (40 * 41 / 2))
        assert peak == pytest.approx(float(whole[:, -1].double().mean()))
    assert shares([seen(Pattern(), 40, None)]) == (1.0, 1.0)


def test_a_window_has_the_formula_s_share():
    """Sinks and a window of n see min(i + 1, INITIAL + n) entries."""
    counts = seen(Pattern(INITIAL, 16), 100, None)[0]
    assert counts.tolist() == [min(i + 1, INITIAL + 16) for i in range(100)]


def test_random_tokens_are_as_many_as_separators_and_others():
    tokens = torch.randint(0, 50, (2, 4000), generator=torch.Generator().manual_seed(0))
    separators = torch.arange(50) % 6 == 0
    mask = Mask("random", Pattern(INITIAL, 8), "random")
    kept, again, other = (mask.kept(tokens, separators, seed) for seed in (3, 3, 4))
    assert torch.equal(kept, again) and not torch.equal(kept, other)
    assert float(kept.float().mean()) == pytest.approx(float(separators[tokens].float().mean()), abs=0.02)
    assert not torch.equal(kept, separators[tokens])


def test_a_ratio_is_of_the_windows_that_both_have():
    losses, beside = [[1.0, 2.0], [3.0, 4.0]], [[0.9, 1.9]]
    assert ratio(losses, beside) == {"ratio": round(math.exp(0.1), 4), "interval": [round(math.exp(0.1), 4)] * 2}
    assert ratio(losses, []) is None


def test_passages_skip_the_front_and_training_keeps_to_other_books(books: Path):
    texts = read_books(books)
    encode = lambda text: list(text.encode())  # noqa: E731
    shelf = shelve(texts, 2, 500, encode, seed=0)
    assert len(shelf.scored) == 2 and not set(shelf.scored) & set(shelf.others) and "short" in shelf.others
    for name, tokens in shelf.scored.items():
        text = bytes(tokens.tolist()).decode()
        assert len(tokens) == 500 and texts[name].index(text) >= len(texts[name]) / 10
        assert texts[name][: texts[name].index(text)].endswith("\n\n")
    found = windows(shelf.others, 5, 100, encode, seed=0)
    assert found.shape == (5, 100)
    assert all(any(bytes(row.tolist()).decode() in text for text in shelf.others.values()) for row in found)
    assert torch.equal(found, windows(shelf.others, 5, 100, encode, seed=0))


def test_books_that_cannot_be_read_are_refused(books: Path, tmp_path: Path):
    encode = lambda text: list(text.encode())  # noqa: E731
    with pytest.raises(InputError, match="cannot read books"):
        read_books(tmp_path / "none.tar.gz")
    (tmp_path / "cut.tar.gz").write_bytes(books.read_bytes()[:600])
    with pytest.raises(InputError, match="cannot read books"):
        read_books(tmp_path / "cut.tar.gz")
    with pytest.raises(InputError, match=r"no \.txt file"):
        read_books(tar(tmp_path / "empty.tar.gz", {"picture.png": b"x"}))
    with pytest.raises(InputError, match="not UTF-8"):
        read_books(tar(tmp_path / "latin.tar.gz", {"a.txt": "é".encode("latin-1")}))
    with pytest.raises(InputError, match="2 books of 100000 tokens are wanted and 0 of 5"):
        shelve(read_books(books), 2, 100_000, encode, seed=0)
    with pytest.raises(InputError, match="no book to train on has 100000"):
        windows(read_books(books), 2, 100_000, encode, seed=0)


def test_questions_are_prompts_with_worked_ones_before_them(questions: Path, tmp_path: Path):
    found = conversations(read_questions(questions), 2, 1, seed=0)
    assert [message["role"] for message in found[0]] == ["user", "assistant", "user"]
    assert "<<" not in found[0][1]["content"] and found[0][:2] == found[1][:2] and found[0][2] != found[1][2]
    assert final("So 2,000.\n#### 2,000") == "2000" and final("#### -3.5.") == "-3.5" and final("I do not know") is None
    with pytest.raises(InputError, match="10 questions are wanted, there are 5"):
        conversations(read_questions(questions), 9, 1, seed=0)
    (tmp_path / "bad.jsonl").write_text('{"question": "1?"}\n')
    for path, said in ((tmp_path / "bad.jsonl", "line 1"), (tmp_path / "none.jsonl", "cannot read")):
        with pytest.raises(InputError, match=said):
            read_questions(path)


def test_parts_of_nothing_known_are_refused(tmp_path: Path):
    (tmp_path / "parts").write_text("{}")
    with pytest.raises(InputError, match="move it away"):
        Cells(tmp_path / "parts", {}, QUIET)
    assert (tmp_path / "parts").read_text() == "{}"
