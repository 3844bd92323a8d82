"""Writers of longer prompts, on captions of Worlds. The pipeline that they are for (``--init``) stays as it is."""

from dataclasses import replace

from mezzotint.data.worlds import WorldsConfig
from mezzotint.methods.enhance import EnhanceConfig
from mezzotint.methods.enhance_grpo import EnhanceGRPOConfig
from mezzotint.recipes.post import continued
from mezzotint.recipes.tiny import SIZES, SizeName
from mezzotint.text.writer import ByteWriterConfig
from mezzotint.train.trainer import RunConfig

HEAD = 32  # channels of an attention head
LENGTH = 288  # bytes of two captions: of 6,000 pairs the longest have 245


def enhance(size: SizeName = "s") -> RunConfig:
    """Long captions from short ones, by next bytes. Reached by step 500: 58% lose nothing; judge 0.94 for 0.84."""
    config = continued(size, share=0.14, lr=4e-3)
    width = SIZES[size].text
    config.data = WorldsConfig(size=config.data.size, long_every=1, seed=9)
    config.method = EnhanceConfig(ByteWriterConfig(width=width, depth=SIZES[size].depth, heads=width // HEAD, length=LENGTH))
    config.train = config.train.replace(batch=16, preview_prompts=(), evaluate=config.train.steps)
    return config


def enhance_grpo(size: SizeName = "s") -> RunConfig:
    """The same writer (``--method.start``), tuned by what is kept and what is said. Reached: 0.66 kept, from 0.70: nothing gained."""
    config = enhance(size)
    assert isinstance(config.method, EnhanceConfig)
    config.data = WorldsConfig(size=config.data.size, long_every=1_000_000, seed=10)
    config.method = EnhanceGRPOConfig(writer=config.method.writer)
    steps = max(4, config.train.steps // 12)
    config.train = config.train.replace(batch=4, steps=steps, log=1, evaluate=steps)
    config.optim = replace(config.optim, lr=3e-4, decay="constant", warmup=2, average=0.9)
    return config
