"""Pixels equal those of transformers' CLIP processor."""

import json

import numpy as np
import pytest
import torch
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from xsd.core import CheckpointError, DatasetError
from xsd.models import pixels


@pytest.mark.parametrize("shape", [(36, 48), (48, 36), (28, 28), (31, 57), (480, 640), (20, 21)])
def test_pixels_equal_transformers_clip_processor(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    size = 28
    processor = CLIPImageProcessorPil(size={"shortest_edge": size},
                                      crop_size={"height": size, "width": size})
    expected = torch.as_tensor(np.asarray(processor(image, return_tensors="np")["pixel_values"]))
    torch.testing.assert_close(pixels.PixelSpec(size, size)([image]), expected, atol=1e-6, rtol=0)


def test_many_large_pictures_at_once_give_what_each_gives_alone():
    draw, spec = np.random.default_rng(0), pixels.PixelSpec(224, 224)
    video = draw.integers(0, 256, (8, 240, 320, 3), dtype=np.uint8)
    assert video[0].size > pixels._LARGE
    whole = spec(video)
    assert whole.dtype == torch.float32 and whole.is_contiguous()
    assert torch.equal(whole, torch.cat([spec([one]) for one in video]))


def test_a_written_spec_reads_back(tmp_path):
    spec = pixels.PixelSpec(32, 28, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    spec.write(tmp_path)
    assert pixels.read_pixel_spec(tmp_path, image_size=28) == spec
    assert pixels.read_pixel_spec(None, image_size=56) == pixels.PixelSpec(56, 56)


def test_a_preprocessor_of_another_tower_is_refused(tmp_path):
    pixels.PixelSpec(28, 28).write(tmp_path)
    with pytest.raises(CheckpointError, match="crops to 28 pixels but the vision tower reads 336"):
        pixels.read_pixel_spec(tmp_path, image_size=336)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        pixels.read_pixel_spec(tmp_path, image_size=28)


def test_a_video_processors_nested_configuration_is_read(tmp_path):
    inner = {
        "size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28},
        "image_mean": [0, 0, 0], "image_std": [1, 1, 1]
    }
    (tmp_path / "processor_config.json").write_text(json.dumps({"video_processor": inner}))
    assert pixels.read_pixel_spec(tmp_path, image_size=28).mean == (0, 0, 0)


def test_other_images_are_refused():
    with pytest.raises(DatasetError, match=r"uint8 \[H, W, 3\] is expected"):
        pixels.PixelSpec(28, 28)([np.zeros((4, 4))])
    with pytest.raises(DatasetError, match="no image to preprocess"):
        pixels.PixelSpec(28, 28)([])
