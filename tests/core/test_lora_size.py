import pytest
import torch

from asdm_core.__main__ import main
from asdm_core.lora_size import mean, shrink
from asdm_core.tensor_file import TensorFile, write_file


def lora(layers, seed=0, dtype=torch.float32):
    """Layers: name -> (outputs, shape of an input, rank, alpha)."""
    g, found = torch.Generator().manual_seed(seed), {}
    for name, (out, inner, rank, alpha) in layers.items():
        ends = (1,) * (len(inner) - 1)
        found[f"{name}.lora_up.weight"] = torch.randn(out, rank, *ends, generator=g).to(dtype)
        found[f"{name}.lora_down.weight"] = torch.randn(rank, *inner, generator=g).to(dtype)
        found[f"{name}.alpha"] = torch.tensor(float(alpha))
    return found


def change(tensors, name):
    up, down = tensors[f"{name}.lora_up.weight"].flatten(1), tensors[f"{name}.lora_down.weight"].flatten(1)
    return float(tensors[f"{name}.alpha"]) / len(down) * up.double() @ down.double()


LAYERS = {"a": (12, (10,), 4, 2), "b": (20, (6, 3, 3), 5, 5), "c": (8, (8,), 6, 1)}


def size(tensors):
    return sum(t.numel() for key, t in tensors.items() if not key.endswith("alpha"))


def test_with_room_for_all_of_it_the_change_stays():
    tensors = lora(LAYERS)
    found, kept = shrink(tensors, size(tensors))
    assert kept == pytest.approx(1) and size(found) == size(tensors)
    for name in LAYERS:
        torch.testing.assert_close(change(found, name), change(tensors, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("most", [40, 150, 300, 420])
def test_what_is_kept_is_the_best_of_its_ranks_and_no_other_choice_is_worth_more(most):
    tensors = lora(LAYERS)
    found, kept = shrink(tensors, most)
    assert size(found) <= most
    error = whole = 0.0
    for name in LAYERS:
        wanted = change(tensors, name)
        values = torch.linalg.svdvals(wanted)
        rank = len(found[f"{name}.lora_down.weight"]) if f"{name}.alpha" in found else 0
        mine = change(found, name) if rank else torch.zeros_like(wanted)
        # Eckart-Young: the squared error of the best approximation of this rank.
        assert float((mine - wanted).square().sum()) == pytest.approx(
            float(values[rank:].square().sum()), rel=1e-4, abs=1e-9
        )
        error, whole = error + float(values[rank:].square().sum()), whole + float(values.square().sum())
    assert kept == pytest.approx(1 - error / whole, abs=1e-6)


def test_a_value_is_weighed_by_what_it_costs():
    tensors = lora({"small": (4, (4,), 1, 1), "large": (400, (400,), 1, 1)})
    for key in tensors:
        tensors[key] /= tensors[key].norm()  # both changes have one value, 1
    found, kept = shrink(tensors, 400)
    assert set(found) == {"small.lora_up.weight", "small.lora_down.weight", "small.alpha"} and 0 < kept < 1


def test_from_a_file_to_a_file_with_all_it_says_of_itself(tmp_path, capsys):
    tensors = lora(LAYERS, dtype=torch.float16)
    write_file(tmp_path / "in.safetensors", tensors, {"ss_network_dim": "6", "other": "kept"})
    assert (
        main(["shrink-lora", str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors"), "--mb", "3e-4"]) == 0
    )
    file = TensorFile(tmp_path / "out.safetensors")
    assert file.metadata["other"] == "kept" and int(file.metadata["ss_network_dim"]) < 6
    assert 2 * size({key: file[key] for key in file}) <= 3e-4 * 2**20
    assert all(file[key].dtype == torch.float16 for key in file) and "% of the change" in capsys.readouterr().out


def test_what_is_no_plain_lora_is_refused(tmp_path, capsys):
    write_file(tmp_path / "in.safetensors", {"a.hada_w1_a": torch.zeros(2, 2)}, {})
    assert main(["shrink-lora", str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors"), "--mb", "1"]) == 2
    assert "a.hada_w1_a" in capsys.readouterr().err and not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "mb", "message"),
    [
        (
            {"a.lora_up.weight": torch.full((12, 2), torch.nan)},
            "1",
            "a.lora_up.weight holds numbers that are not finite",
        ),
        ({"a.lora_up.weight": torch.zeros(2), "a.lora_down.weight": torch.zeros(2)}, "1", "one of them is a vector"),
        ({}, "inf", "--mb: wanted a finite number above 0, got inf"),
        ({}, "0", "--mb: wanted a finite number above 0, got 0"),
    ],
)
def test_broken_input_is_one_sentence(tmp_path, capsys, change, mb, message):
    write_file(tmp_path / "in.safetensors", lora(LAYERS) | change, {})
    assert main(["shrink-lora", str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors"), "--mb", mb]) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_there_is_not_overwritten(tmp_path, capsys):
    for name in "ab":
        write_file(tmp_path / f"{name}.safetensors", lora(LAYERS), {})
    assert main(["shrink-lora", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--mb", "1"]) == 2
    assert "b.safetensors is there already, and comes last" in capsys.readouterr().err


def test_the_mean_of_several_is_the_mean_of_their_changes(tmp_path):
    other = {"a": (12, (10,), 2, 5), "b": (20, (6, 3, 3), 5, 1), "c": (8, (8,), 1, 1)}
    loras = [lora(LAYERS), lora(other, seed=1), lora(LAYERS, seed=2)]
    del loras[1]["a.alpha"]  # which is its rank then
    found = mean(loras)
    loras[1]["a.alpha"] = torch.tensor(2.0)
    for name in LAYERS:
        wanted = sum(change(one, name) for one in loras) / 3
        torch.testing.assert_close(change(found, name), wanted, rtol=1e-5, atol=1e-5)
        assert found[f"{name}.lora_up.weight"].shape[2:] == loras[0][f"{name}.lora_up.weight"].shape[2:]
    for number, one in enumerate(loras):
        write_file(tmp_path / f"{number}.safetensors", one, {"other": str(number)})
    files = [str(tmp_path / f"{name}.safetensors") for name in (0, 1, 2, "out")]
    assert main(["shrink-lora", *files, "--mb", "1"]) == 0
    file = TensorFile(files[-1])
    torch.testing.assert_close(change({k: file[k] for k in file}, "b"), change(found, "b"), rtol=1e-5, atol=1e-5)
    assert file.metadata["other"] == "0"


def test_a_mean_is_of_the_same_layers_in_the_same_shapes():
    with pytest.raises(ValueError, match="number 1 or 2 lacks c"):
        mean([lora(LAYERS), lora({name: LAYERS[name] for name in "ab"})])
    with pytest.raises(ValueError, match="b has another shape in number 3 than in number 1"):
        mean([lora(LAYERS), lora(LAYERS), lora(LAYERS | {"b": (20, (6, 1, 1), 5, 5)})])
