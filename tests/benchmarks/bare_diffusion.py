"""What the LoRA of a diffusion model is held against, in the same image.

bare_diffusion.py make /output: Stable Diffusion; UNet of 6.5 million parameters, VAE of 15 million, CLIP of 38 million.
bare_diffusion.py loop /model STEPS BATCH: steps a second from the second step on, latents and texts being in memory.
"""

import sys
import time

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig

TARGETS = r".*\.(to_q|to_k|to_v|to_out\.0)"


def make(target: str) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    from trainbox.container.tiny_pipelines import _clip_tokenizer, _sd15

    torch.manual_seed(0)
    pipe = _sd15()
    size = len(_clip_tokenizer())
    text = CLIPTextConfig(
        vocab_size=size, hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8,
        bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        block_out_channels=(64, 128, 128), layers_per_block=1, cross_attention_dim=512, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(64, 128, 256, 256), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, layers_per_block=1,
    )  # fmt: skip
    pipe.register_modules(text_encoder=CLIPTextModel(text), unet=unet, vae=vae)
    pipe.save_pretrained(target)
    print("parameters", unet.num_parameters(), vae.num_parameters(), pipe.text_encoder.num_parameters())


def loop(model_path: str, steps: int, batch: int) -> None:
    torch.manual_seed(42)
    unet = UNet2DConditionModel.from_pretrained(model_path, subfolder="unet").requires_grad_(False).train()
    unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS))
    schedule = DDPMScheduler.from_pretrained(model_path, subfolder="scheduler")
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    latents, texts = torch.randn(batch, 4, 32, 32), torch.randn(batch, 77, 512)
    since = 0.0
    for number in range(steps):
        noise = torch.randn_like(latents)
        level = torch.randint(0, 1000, (batch,))
        predicted = unet(schedule.add_noise(latents, noise, level), level, encoder_hidden_states=texts).sample
        torch.nn.functional.mse_loss(predicted, noise).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if number == 0:
            since = time.monotonic()
    print("steps/s", (steps - 1) / (time.monotonic() - since), flush=True)


if sys.argv[1] == "make":
    make(sys.argv[2])
else:
    loop(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
