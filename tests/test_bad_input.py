"""What a user gets wrong, through the command line: exit code 2, one line that names it, nothing at the output."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from moefactor.checkpoint import INDEX
from tiny import tokenizer


@pytest.fixture
def refused(command: Callable, tmp_path: Path) -> Callable[..., str]:
    """Runs a command that must fail; returns what it says."""

    def run(*arguments: object) -> str:
        code, _, err = command(*arguments)
        lines = [line for line in err.splitlines() if "error:" in line]
        assert code == 2, err
        assert "Traceback" not in err
        assert len(lines) == 1, err
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()
        return lines[0].partition("error:")[2].strip()

    return run


@pytest.fixture
def compress(refused: Callable[..., str], tmp_path: Path, text_file: Path) -> Callable[..., str]:
    def run(source: object, *arguments: object, method: str = "svd") -> str:
        usual = ("--samples", 2, "--seqlen", 16)
        if "--calibration" not in arguments:
            usual = (*usual, "--calibration", text_file)
        if method in ("svd", "mobe"):  # which read no text
            usual = ()
        return refused("compress", source, "-o", tmp_path / "out", "-m", method, *usual, *arguments)

    return run


@pytest.fixture
def source(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("qwen3_moe")


def shard_of(folder: Path, part: str) -> tuple[Path, str]:
    """The file that holds the first tensor whose name contains `part`, and that name."""
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    name = next(n for n in sorted(index) if part in n)
    return folder / index[name], name


def edit(folder: Path, part: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> str:
    """Changes one tensor in its file, or takes it out; returns its name."""
    path, name = shard_of(folder, part)
    tensors = load_file(path)
    changed = change(tensors.pop(name).clone())
    save_file(tensors | ({} if changed is None else {name: changed}), path, metadata={"format": "pt"})
    return name


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[3] = torch.nan
    return tensor


# -- checkpoints ---------------------------------------------------------------------------------------------------


def test_a_missing_shard(source: Path, copied: Callable, compress: Callable) -> None:
    folder = copied(source)
    path, _ = shard_of(folder, "experts")
    path.unlink()
    assert f"{path.name}: this shard is missing" in compress(folder)


@pytest.mark.parametrize("size", [0, 5, 3000])
def test_a_truncated_shard(size: int, source: Path, copied: Callable, compress: Callable) -> None:
    folder = copied(source)
    path, _ = shard_of(folder, "experts")
    path.write_bytes(path.read_bytes()[:size])
    assert f"{path.name}: damaged or truncated" in compress(folder)


def test_an_index_that_promises_too_much(source: Path, copied: Callable, compress: Callable) -> None:
    folder = copied(source)
    name = edit(folder, "experts", lambda tensor: None)
    assert f"promises {name} here, and it is not" in compress(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_an_index_that_is_none(content: str, source: Path, copied: Callable, compress: Callable) -> None:
    folder = copied(source)
    (folder / INDEX).write_text(content)
    assert INDEX in compress(folder)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("method", ["svd", "whitened_svd"])
def test_nan_in_an_expert(kind: str, method: str, tiny_model: Callable, copied: Callable, compress: Callable) -> None:
    folder = copied(tiny_model(kind))
    edit(folder, "layers.1.mlp.experts", with_nan)
    message = compress(folder, method=method)
    assert "layers.1.mlp.experts" in message
    assert "expert 0" in message
    assert "not finite" in message


@pytest.mark.parametrize("method", ["svd", "whitened_svd"])
def test_nan_in_attention(method: str, source: Path, copied: Callable, compress: Callable) -> None:
    """svd never loads it, but would copy it."""
    folder = copied(source)
    name = edit(folder, "layers.0.self_attn.k_proj", with_nan)
    message = compress(folder, method=method)
    assert name in message
    assert "not finite" in message


@pytest.mark.parametrize("part", ["layers.1.mlp.experts.0.down_proj", "layers.0.self_attn.k_proj"])
def test_a_tensor_of_another_shape(part: str, source: Path, copied: Callable, compress: Callable) -> None:
    folder = copied(source)
    edit(folder, part, lambda tensor: tensor[:-1].contiguous())
    message = compress(folder, method="whitened_svd")
    assert part.removesuffix(".0.down_proj") in message


@pytest.mark.parametrize("part", ["layers.1.mlp.experts.3.up_proj", "layers.0.self_attn.k_proj", "lm_head"])
@pytest.mark.parametrize("method", ["svd", "whitened_svd"])
def test_a_tensor_that_nobody_promised(
    part: str, method: str, source: Path, copied: Callable, compress: Callable
) -> None:
    """Absent from the index as from the files: only the architecture knows that it should be there."""
    folder = copied(source)
    _, name = shard_of(folder, part)
    edit(folder, part, lambda tensor: None)
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"][name]
    (folder / INDEX).write_text(json.dumps(index))
    assert part.split(".3.")[0] in compress(folder, method=method)


def test_what_is_not_a_model(tmp_path: Path, refused: Callable) -> None:
    assert "no config.json there" in refused("inspect", tmp_path)
    assert "no such folder" in refused("inspect", tmp_path / "gone")
    (tmp_path / "config.json").write_text("{ 'a'")
    assert "not valid JSON at line 1" in refused("inspect", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "martian"}')
    assert "martian" in refused("inspect", tmp_path)


def test_a_config_without_weights(source: Path, tmp_path: Path, refused: Callable) -> None:
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    assert "only safetensors checkpoints are read" in refused("inspect", tmp_path)


def test_a_config_of_another_model(source: Path, copied: Callable, compress: Callable) -> None:
    folder = copied(source)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 40}))
    assert "layers.0.mlp.experts" in compress(folder)


def test_a_dense_model(tmp_path: Path, compress: Callable) -> None:
    config = LlamaConfig(
        vocab_size=260, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer().save_pretrained(tmp_path / "llama")
    assert "a dense model, there are no routed experts" in compress(tmp_path / "llama")


# -- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", ["0", "1", "1.5", "-0.2", "nan"])
def test_ratios_that_are_none(ratio: str, source: Path, compress: Callable) -> None:
    assert f"ratio must lie between 0 and 1, found {ratio}" in compress(source, "--ratio", float(ratio)).replace(
        ".0:", ":"
    )


def test_a_ratio_out_of_reach_says_which_is_not(
    source: Path, compress: Callable, command: Callable, tmp_path: Path
) -> None:
    """down stays dense with rfid, a third of everything."""
    message = compress(source, "--ratio", 0.7, method="rfid")
    assert "--projections gate,up,down" in message
    reach = message.partition("projections and options is ")[2].split(";")[0]
    assert 0.5 < float(reach) < 0.667
    code, _, err = command("compress", source, "-o", tmp_path / "out", "-m", "rfid", "--ratio", reach, "--samples", 2)
    assert code == 0, err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "rfit"), "Unknown method 'rfit'. Did you mean 'rfid'? Available:"),
        (("--method", "[red]x"), "Unknown method '[red]x'"),
        (("--joined", "true"), "Unknown option of svd 'joined'. Did you mean 'joint'?"),
        (("--joint", "maybe"), "svd: joint must be bool, found 'maybe'"),
        (("--projections", "gate,upp"), "Unknown projection 'upp'. Did you mean 'up'?"),
        (("--projections", ""), "projection"),
        (("--allocation", "evenly"), "Unknown allocation 'evenly'"),
        (("--rank-multiple", "0"), "--rank-multiple must be at least 1"),
        (("surplus",), "Unexpected argument 'surplus'"),
        (("--method", "rfid", "--seqlen", "500"), "Windows of 500 tokens: this model takes 128 at most"),
        (("--device", "quantum"), "quantum"),
    ],
)
def test_wrong_arguments(arguments: tuple, message: str, source: Path, compress: Callable) -> None:
    assert message in compress(source, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--group-size", "many"), "rfid: group_size must be int, found 'many'"),
        (("--group-size", "9"), "group_size must be from 1 to the number of experts, 8"),
        (("--score", "fussed"), "Did you mean 'fused'?"),
        (("--xi", "2"), "xi must be from 0 to 1"),
    ],
)
def test_wrong_options_of_a_method(arguments: tuple, message: str, source: Path, compress: Callable) -> None:
    assert message in compress(source, *arguments, method="rfid")


@pytest.mark.parametrize("multiple", [0, -8, 1000])
@pytest.mark.parametrize("method", ["biaxial", "channels"])
def test_a_multiple_that_no_width_has(method: str, multiple: int, source: Path, compress: Callable) -> None:
    message = compress(source, "--width-multiple", multiple, "--own-text", 0, method=method)
    assert "--width-multiple must be from 1 to the experts' width, " in message
    assert f"found {multiple}" in message


def test_an_output_that_exists(source: Path, command: Callable, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    code, _, err = command("compress", source, "-o", tmp_path / "out")
    assert code == 2
    assert "out: exists already" in err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]
    assert command("export", source, "--dense", "-o", tmp_path / "out")[0] == 2


# -- text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"), [("", "the text is empty"), ("Too short.", "10 tokens are too few for one window of 16")]
)
def test_text_without_enough_in_it(
    content: str, message: str, source: Path, tmp_path: Path, compress: Callable
) -> None:
    path = tmp_path / "text.txt"
    path.write_text(content)
    assert message in compress(source, "--calibration", path, method="rfid")


def test_text_that_is_not_there(source: Path, tmp_path: Path, compress: Callable) -> None:
    message = compress(source, "--calibration", tmp_path / "gone.txt", method="rfid")
    assert "gone.txt: no such text file or folder" in message


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("svd", ("--calibration", "text.txt"), "svd reads no text with these options; leave --calibration out"),
        ("svd", ("--seqlen", 16), "leave --seqlen out"),
        ("svd", ("--own-text", 0.5), "leave --own-text out"),
        ("biaxial", ("--own-text", 0, "--allocation", "loss"), "in its own way and takes no --allocation"),
        ("reap", ("--rank-multiple", 4), "--rank-multiple: this method buys no ranks"),
        ("mobe", ("--ratio", 0.05, "--rank-multiple", 4), "--rank-multiple: this method buys"),
        ("channels", ("--rank-multiple", 4), "(Channels have --width-multiple.)"),
    ],
)  # fmt: skip
def test_options_that_a_method_does_not_read(
    method: str, arguments: tuple, message: str, source: Path, compress: Callable
) -> None:
    assert message in compress(source, *arguments, method=method)


# -- run folders ---------------------------------------------------------------------------------------------------


@pytest.fixture
def planned(source: Path, command: Callable, tmp_path: Path) -> Path:
    code, _, err = command("plan", source, "--run", tmp_path / "run", "-m", "svd")
    assert code == 0, err
    return tmp_path / "run"


def test_ranks_beyond_the_budget(source: Path, planned: Path, refused: Callable, tmp_path: Path) -> None:
    plan = json.loads((planned / "plan.json").read_text())
    plan["layers"][0]["stacks"]["gate"]["ranks"] = [24] * 8
    (planned / "plan.json").write_text(json.dumps(plan))
    message = refused("factorise", source, "--run", planned, "-o", tmp_path / "out")
    assert "ratio 0.4 allows" in message
    plan["layers"][0]["stacks"]["gate"]["ranks"] = [25] * 8
    (planned / "plan.json").write_text(json.dumps(plan))
    message = refused("factorise", source, "--run", planned, "-o", tmp_path / "out")
    assert "layers.0.mlp.experts gate: rank 25 of group 0 does not fit" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "svt"}, "Unknown method 'svt'. Did you mean 'svd'?"),
        ({"options": {"joined": True}}, "'joined'"),
        ({"layers": []}, "the plan's layers are not the model's"),
    ],
)
def test_a_plan_edited_wrongly(
    change: dict, message: str, source: Path, planned: Path, refused: Callable, tmp_path: Path
) -> None:
    plan = json.loads((planned / "plan.json").read_text())
    (planned / "plan.json").write_text(json.dumps(plan | change))
    assert message in refused("factorise", source, "--run", planned, "-o", tmp_path / "out")


def test_a_plan_that_is_no_json(source: Path, planned: Path, refused: Callable, tmp_path: Path) -> None:
    (planned / "plan.json").write_text((planned / "plan.json").read_text()[:-100])
    assert "plan.json: not valid JSON" in refused("factorise", source, "--run", planned, "-o", tmp_path / "out")


@pytest.mark.parametrize("name", ["journal.json", "calibration.json"])
@pytest.mark.parametrize("content", ["{", "[]", '{"plan": 3}'])
def test_a_run_folder_in_disorder(
    name: str, content: str, source: Path, planned: Path, refused: Callable, tmp_path: Path
) -> None:
    (planned / name).write_text(content)
    if name == "journal.json":
        message = refused("factorise", source, "--run", planned, "-o", tmp_path / "out")
        assert "journal.json" in message
    elif content == "{":
        message = refused("plan", source, "--run", planned, "-m", "rfid")
        assert "calibration.json" in message


def test_stages_out_of_order(source: Path, refused: Callable, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    assert "Run `moefactor calibrate" in refused("plan", source, "--run", run, "-m", "rfid")
    assert "Run `moefactor plan` first" in refused("factorise", source, "--run", run, "-o", out)
    assert "Unknown statistic 'routes'" in refused("calibrate", source, "--run", run, "--statistics", "routes")


def test_statistics_that_were_not_collected(source: Path, refused: Callable, command: Callable, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert command("plan", source, "--run", run, "-m", "whitened_svd")[0] == 0
    message = refused("factorise", source, "--run", run, "-o", tmp_path / "out", "--no-sequential")
    assert "Run `moefactor calibrate" in message
    assert "--method whitened_svd` first" in message


# -- as a process of its own ---------------------------------------------------------------------------------------


def test_a_real_process_ends_with_2_and_one_line(source: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "moefactor.cli", "compress", str(source), "-o", str(tmp_path / "out"), "-m", "svdd"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    # The progress bar leaves an empty line behind.
    assert done.stderr.strip().startswith("error: Unknown method 'svdd'. Did you mean 'svd'?")
    assert len(done.stderr.split("\n")) <= 3


def test_debug_shows_where(source: Path, command: Callable, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Unknown method 'svdd'"):
        command("--debug", "compress", source, "-o", tmp_path / "out", "-m", "svdd")
