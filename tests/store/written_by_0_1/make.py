"""How the files in this folder were made, with version 0.1: `python make.py FOLDER`."""

import json
import os
import shutil
import sys
from pathlib import Path

out = Path(sys.argv[1])
shutil.rmtree(out, ignore_errors=True)
out.mkdir(parents=True)
os.environ["HF_FLASH_CACHE"] = str(out / "cache")
os.chdir(out)
import torch

import hf_flash

print(hf_flash.__file__)
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

torch.manual_seed(0)
model = OPTForCausalLM(
    OPTConfig(
        vocab_size=48,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        dropout=0.0,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
        init_std=0.2,
    )
)
with torch.no_grad():
    for layer in model.model.decoder.layers:
        layer.fc1.bias.normal_(-1.0, 0.5)
        layer.fc2.bias.normal_(0.0, 0.1)
model.to(torch.float16).save_pretrained("plain")
hf_flash.repack("plain", "packed")
hf_flash.repack("plain", "calibrated", predictor_bits=8)
generator = torch.Generator().manual_seed(0)
text = torch.randint(4, 48, (16 * 64,), generator=generator)
hf_flash.calibrate("calibrated", text, samples=16, context=32, rank=8, epochs=1)
snapshot = out / "models--me--opt" / "snapshots" / ("0123456789" * 4)
shutil.copytree("plain", snapshot)
for path in snapshot.iterdir():
    os.utime(path, (1_700_000_000, 1_700_000_000))
AutoModelForCausalLM.from_pretrained(snapshot, quantization_config=hf_flash.FlashOffloadConfig(predictor_group_size=8))
shutil.rmtree(out / "models--me--opt")
for lock in (out / "cache").glob(".*"):
    lock.unlink()
found = {}
for name in ("plain", "packed", "calibrated"):
    config = hf_flash.FlashOffloadConfig(predictor="none") if name == "plain" else None
    torch.manual_seed(0)
    for predictor in (
        (None,) if name == "plain" else ("none", "quantized", "lowrank") if name == "calibrated" else ("none", "quantized")
    ):
        more = {} if name == "plain" else {"quantization_config": hf_flash.FlashOffloadConfig(predictor=predictor)}
        m = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **more)
        ids = torch.arange(4, 44).view(2, 20)
        with torch.no_grad():
            found[f"{name} {predictor}"] = m(ids).logits.argmax(-1).flatten().tolist()
Path("tokens.json").write_text(json.dumps(found, indent=1))
print(found)
