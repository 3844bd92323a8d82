"""A pipeline for every technique on every network."""

from dataclasses import dataclass

import torch

from mezzotint.pipeline import Pipeline, PipelineConfig


@dataclass
class PreparedConfig(PipelineConfig, kind="test-prepared"):
    """A pipeline whose output layers are not zero, as if it had been trained."""

    def build(self) -> Pipeline:
        torch.manual_seed(0)
        pipeline = super().build()
        for parameter in pipeline.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
        return pipeline
