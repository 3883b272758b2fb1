"""A full disk and exhausted memory: real errors of the libraries that write and allocate, and what a user reads of them."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from align.engine.faults import during, unless_removed
from align.engine.timer import Clock
from align.errors import UserError
from align.runs.files import write_text
from tests.worlds import letter_tokenizer


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Within the block no file may grow beyond `size` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_text("x" * 5000),
    "safetensors": lambda path: save_file({"weight": torch.zeros(5000)}, path),
    "tokenizers": lambda path: letter_tokenizer().backend_tokenizer.save(str(path)),
    "torch": lambda path: torch.save(torch.zeros(500_000), path),
}


@pytest.mark.parametrize("library", WRITERS)
def test_a_file_that_cannot_be_written(tmp_path: Path, library: str) -> None:
    file = tmp_path / "checkpoint-4" / "file"
    file.parent.mkdir()
    with pytest.raises(UserError) as caught, largest_file(500), during("checkpoint", file):
        WRITERS[library](file)
    message = str(caught.value)
    assert message.startswith(f"{file}: error while writing a checkpoint: ")
    assert "MB are free there" in message
    assert "the same command then continues from the last checkpoint" in message
    if library != "torch":  # which does not say why
        assert "File too large" in message


def write(path: Path | str) -> None:
    with open(path, "w") as file:
        file.write("line\n")


def test_a_full_disk() -> None:
    words = r"/dev/full: error while writing the record of the run: No space left on device, [\d.,]+ MB are free there\. Free"
    with pytest.raises(UserError, match=words), during("records", Path("/dev/full")):
        write("/dev/full")


def test_without_a_word_from_the_block_only_what_must_be_the_disk_counts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="error while preparing rows and models: No space left"), during("start"):
        write("/dev/full")
    with pytest.raises(FileNotFoundError), during("start"):
        (tmp_path / "missing").read_bytes()
    with pytest.raises(FileNotFoundError), during("model", tmp_path):  # a mistake in the code, with a traceback
        (tmp_path / "training_args.bin").unlink()


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    file = tmp_path / "out" / "metrics.jsonl"
    words = r"its folder was removed while the stage ran\. Start the stage again"
    with pytest.raises(UserError, match=words), during("records", file):
        write(file)


def test_the_output_folder_is_gone_whatever_misses_it_first(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for missing in (out, out / "untrained" / "config.json"):
        with pytest.raises(UserError, match="out: the output folder was removed or renamed while"), unless_removed(out):
            missing.stat()
    with pytest.raises(FileNotFoundError), unless_removed(out):
        (tmp_path / "rows.jsonl").read_text()
    out.mkdir()
    with pytest.raises(FileNotFoundError), unless_removed(out):
        (out / "config.json").read_text()


def test_what_cannot_be_written_whole_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("before")
    with pytest.raises(OSError, match="File too large"), largest_file(500):
        write_text(tmp_path / "run.json", "x" * 5000)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert (tmp_path / "run.json").read_text() == "before"


CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB")


def raises(error: BaseException) -> Callable[[], object]:
    def function() -> None:
        raise error

    return function


@pytest.mark.parametrize(
    ("allocate", "words"),
    [
        (lambda: bytearray(2**62), r"out of memory while generating responses\. "),
        (
            lambda: torch.empty(2**58),
            r"out of memory while generating responses \(.*allocate 1152921504606846976 bytes",
        ),
        (
            raises(CUDA),
            r"out of GPU memory while generating responses \(CUDA out of memory Tried to allocate 2.00 GiB\)",
        ),
        (raises(OSError(12, "Cannot allocate memory")), "out of memory while generating responses"),
    ],
)
def test_the_phase_in_which_memory_ran_out(allocate: Callable[[], object], words: str) -> None:
    clock = Clock()
    words += (
        r".*Lower per_device_generation_batch_size in PPO, elsewhere per_device_eval_batch_size; or response_length\."
    )
    with pytest.raises(UserError, match=words), clock.phase("update_policy"), clock.phase("generate"):
        allocate()
    assert clock.running == []


def test_memory_that_a_reward_function_ran_out_of() -> None:
    error = ValueError("reward 'judge': MemoryError:")
    error.__cause__ = MemoryError()
    words = r"out of memory while scoring responses by the reward \(reward 'judge': MemoryError"
    with pytest.raises(UserError, match=words), Clock().phase("score_reward"):
        raise error


def test_other_errors_are_left_as_they_are() -> None:
    for error in (
        KeyError("x"),
        RuntimeError("shape mismatch"),
        UserError("no space left: your own words"),
        OSError("x"),
    ):
        with pytest.raises(type(error)) as caught, during("training"):
            raise error
        assert caught.value is error
