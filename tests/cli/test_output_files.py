"""What the commands other than stages write: nothing of the user's is overwritten, and no half of anything is left."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from align.cli import merge, verify
from align.cli.report_file import check_json_report
from align.cli.steps import read_steps
from align.errors import UserError


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


class TestReport:
    @pytest.mark.parametrize("content", ["mine", "[]", '{"passed": true}', ""])
    def test_a_file_of_the_user_is_not_overwritten(self, here, monkeypatch, content):
        monkeypatch.setattr(verify, "train", lambda *_: pytest.fail("it trained first"))
        Path("found.json").write_text(content)
        with pytest.raises(UserError, match=r"--json: found\.json exists and is not a report of this command"):
            verify.run(None, "found.json")
        assert Path("found.json").read_text() == content

    def test_nor_what_is_no_file(self, here):
        report = json.dumps({"passed": True, "seconds": 1, "cases": []})
        Path("report.json").write_text(report)
        check_json_report(Path("report.json"))
        check_json_report(Path("new.json"))
        Path("link.json").symlink_to("report.json")
        for path in ("/dev/null", "link.json", "."):
            with pytest.raises(UserError, match="is not overwritten"):
                verify.run(None, path)


class TestMerge:
    @pytest.fixture
    def adapter(self, here):
        Path("tuned/adapter").mkdir(parents=True)
        Path("tuned/adapter/adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
        return here

    @pytest.mark.parametrize(
        ("output", "said"),
        [
            ("tuned", "tuned: exists already; name a new folder."),
            ("loose", "loose: exists already; name a new folder."),
            ("tuned/adapter/merged", "tuned/adapter/merged: lies in the folder of the adapter"),
            ("$NOT_SET_HERE", "align merge: no environment variable NOT_SET_HERE"),
            ("", "align merge: expected a path, got an empty one"),
        ],
    )
    def test_refused(self, adapter, output, said):
        Path("loose").symlink_to("nowhere")
        with pytest.raises(UserError) as error:
            merge.run("tuned", output)
        assert str(error.value).startswith(said)

    def test_one_of_two_wins_and_an_error_leaves_nothing(self, here):
        def write(text: str, meanwhile: Callable[[], None] = lambda: None) -> None:
            with merge.new_folder(Path("a/b/merged")) as fresh:
                (fresh / "weights").write_text(text)
                meanwhile()

        with pytest.raises(UserError, match=r"a/b/merged: cannot be written \(Directory not empty\)"):
            write("second", meanwhile=lambda: write("first"))
        assert [path.as_posix() for path in Path("a").rglob("*")] == ["a/b", "a/b/merged", "a/b/merged/weights"]
        assert Path("a/b/merged/weights").read_text() == "first"
        with pytest.raises(ZeroDivisionError), merge.new_folder(Path("c/d/merged")):
            raise ZeroDivisionError
        assert not Path("c").exists()


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ("out/1", "r/2_b.yaml: output_dir: out/1 is also the output_dir of r/1_a.yaml"),
        ("out/1/x", "r/2_b.yaml: output_dir: out/1/x lies in the output_dir of r/1_a.yaml"),
        ("out", "r/2_b.yaml: output_dir: out holds the output_dir of r/1_a.yaml"),
        ("mine", "r/2_b.yaml: output_dir: mine holds notes.txt, and no stage.json or run.json"),
    ],
)
def test_every_output_of_a_pipeline_is_free_before_its_first_step(here, second, said):
    for folder in ("r", "mine"):
        Path(folder).mkdir()
    Path("mine/notes.txt").write_text("mine")
    for name, output in (("1_a", "out/1"), ("2_b", second)):
        Path(f"r/{name}.yaml").write_text(
            f"stage: sft\noutput_dir: {output}\nmodel_name_or_path: base\ntrain_dataset: rows.jsonl\n"
        )
    with pytest.raises(UserError) as error:
        read_steps("r", None, [])
    assert str(error.value).startswith(said)
    assert not Path("out").exists()
