"""Models from their configs: those shipped have the published sizes."""

from __future__ import annotations

import pytest
from widemargin.trainer.plan.estimate import read_settings
from widemargin.trainer.plan.shapes import PUBLISHED, find_config, model_size

from tests.support.estimates import CONFIGS, PARAMETERS, settings


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_shipped_shapes_have_the_published_counts(name):
    given = settings(model_name_or_path=name)
    size = model_size(find_config(given, None)[0], given)
    assert size.total == size.trainable == PARAMETERS[name]
    assert size.tied == (name == "google/gemma-2-9b-it")


def test_every_shipped_config_has_a_shape():
    for path in (CONFIGS / "train").glob("*.yaml"):
        name = read_settings(str(path)).model_name_or_path
        assert name in PUBLISHED or path.stem == "quickstart"
