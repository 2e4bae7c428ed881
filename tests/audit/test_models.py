import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

from sd_memguard.assets import tiny_sd_path
from sd_memguard.audit import AuditError
from sd_memguard.audit.generate import generate_images
from sd_memguard.audit.models import LORA_FILE, ModelFiles, find_model, load_pipeline, model_sha256, read_run_records
from sd_memguard.export.single_file import single_file_weights

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA file that changes the bundled model a lot."""
    folder = tmp_path_factory.mktemp("lora")
    pipeline = load_pipeline(tiny_sd_path(), CPU)
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
    pipeline.save_lora_weights(folder, unet_lora_layers=layers)
    return folder / LORA_FILE


def test_a_lora_is_put_on_its_base(lora):
    files = find_model(f"bundled+{lora}")
    assert files == ModelFiles(tiny_sd_path(), lora)
    assert find_model(f"{tiny_sd_path()}+{lora.parent}") == files
    plain, adapted = (
        generate_images(load_pipeline(model, CPU), ["red apple"], [1], num_inference_steps=2)
        for model in (tiny_sd_path(), files)
    )
    assert (plain.int() - adapted.int()).abs().max() > 10
    assert model_sha256(files) != model_sha256(find_model("bundled"))


def test_a_one_file_checkpoint_is_loaded_with_the_configs_of_a_folder(tmp_path):
    pipeline = load_pipeline(tiny_sd_path(), CPU)
    with torch.no_grad():
        pipeline.unet.conv_out.bias += 0.1
    parts = {name: getattr(pipeline, name) for name in ("unet", "vae", "text_encoder")}
    configs = {name: part.config if name != "text_encoder" else part.config.to_dict() for name, part in parts.items()}
    weights, _ = single_file_weights({name: part.state_dict() for name, part in parts.items()}, configs)
    file = tmp_path / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file)
    loaded = load_pipeline(find_model(f"bundled+{file}"), CPU)
    expected, found = pipeline.unet.state_dict(), loaded.unet.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    generated = [generate_images(model, ["red apple"], [1], num_inference_steps=2) for model in (pipeline, loaded)]
    assert torch.equal(*generated)


def test_the_hash_follows_the_weights_and_not_the_place(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd_path(), folder)
    (folder / "notes.md").write_text("nothing to do with it")
    (folder / "checkpoint-1" / "unet").mkdir(parents=True)
    (folder / "checkpoint-1" / "unet" / "model.safetensors").write_text("nor this")
    before = model_sha256(ModelFiles(folder, None))
    assert before == model_sha256(find_model("bundled"))
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({**config, "beta_end": 0.02}))
    assert model_sha256(ModelFiles(folder, None)) != before


def test_what_is_no_model_is_named(tmp_path):
    def refuse(text, message):
        with pytest.raises(AuditError, match=message):
            load_pipeline(find_model(text), CPU)

    refuse(str(tmp_path), "is no pipeline: it has no model_index.json")
    refuse(str(tmp_path / "nothing"), "must be a diffusers folder or a .safetensors file")
    (tmp_path / "model.ckpt").write_bytes(b"pickle")
    refuse(str(tmp_path / "model.ckpt"), "must be a diffusers folder or a .safetensors file")
    refuse(f"bundled+{tmp_path / 'model.ckpt'}", "must be a .safetensors file, or a folder with")
    refuse(f"bundled+{tmp_path}", "must be a .safetensors file, or a folder with")
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"broken")
    refuse(str(file), "is damaged")
    save_file({"lora.up.weight": torch.zeros(2, 2)}, file)
    refuse(str(file), "holds no whole checkpoint; put its base first: FOLDER\\+weights.safetensors")
    refuse(f"bundled+{file}", "cannot be loaded")
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2, 2)}, file)
    refuse(f"bundled+{file}", "cannot be loaded")


def test_records_of_a_run_are_read_where_there_are_any(tmp_path):
    assert read_run_records(tmp_path) == (None, None)
    (tmp_path / "memguard").mkdir()
    config = {"num_shards": 3, "preset": "paper", "memguard": "on", "seed": 1}
    (tmp_path / "memguard" / "config.json").write_text(json.dumps(config))
    (tmp_path / "memguard" / "rounds.jsonl").write_text('{"global_step": 5}\n{"global_step": 9}\n')
    pq.write_table(pa.table({"sample_id": [0, 2]}), tmp_path / "memguard" / "samples.parquet")
    run, samples = read_run_records(tmp_path)
    assert run == {"num_shards": 3, "num_rounds": 2, "global_step": 9, "preset": "paper", "memguard": "on"}
    assert samples == {"sample_id": [0, 2]}
