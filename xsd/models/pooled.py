"""Video-LLaVA with fewer visual tokens: of every frame the means of squares of patches, without
CLS. A configuration asks for it with ``video_pool``, the side of a square; transformers' own class
computes all else, its ``generate`` included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import VideoLlavaConfig, VideoLlavaForConditionalGeneration
from transformers.models.video_llava.modeling_video_llava import VideoLlavaMultiModalProjector

from xsd.core import CheckpointError


class PoolingProjector(VideoLlavaMultiModalProjector):
    """The projector, then the means of its squares."""

    def __init__(self, config: VideoLlavaConfig) -> None:
        super().__init__(config)
        self.pool = config.video_pool

    def forward(self, image_features: Tensor) -> Tensor:
        """[N, 1 + p · p, C] tower states to [N, (p / pool)², D]."""
        side = int(image_features.shape[1]**0.5)
        tokens = super().forward(image_features[:, -side * side:])
        squares = tokens.unflatten(1, (side // self.pool, self.pool, side // self.pool, self.pool))
        return squares.mean(dim=(2, 4)).flatten(1, 2)


class PooledVideoLlava(VideoLlavaForConditionalGeneration):
    """Video-LLaVA with a :class:`PoolingProjector`."""

    def __init__(self, config: VideoLlavaConfig) -> None:
        super().__init__(config)
        self.model.multi_modal_projector = PoolingProjector(config)
        self.post_init()


def class_for(config: Any, model_class: type, folder: Path) -> type:
    """``model_class``, or the pooled one where the configuration asks for it. Raises:
    CheckpointError for squares that do not divide a frame."""
    pool = getattr(config, "video_pool", None)
    if pool is None or model_class is not VideoLlavaForConditionalGeneration:
        return model_class
    side = config.vision_config.image_size // config.vision_config.patch_size
    if type(pool) is not int or not 1 <= pool <= side or side % pool:
        raise CheckpointError(f"{folder}/config.json pools squares of video_pool={pool!r} patches, "
                              f"but a frame has {side} in a row; give a divisor of that")
    return PooledVideoLlava
