"""Three torchvision architectures under every strategy; tests/nightly has those of transformers.

transformers is not a development dependency (155 MB for one script). So only that script uses it,
and fails without it. No test here is skipped because a package is missing.
"""

import pytest
import real_models

BATCHNORM = "mobilenet_v3"
CELLS = [
    (name, strategy)
    for name in (BATCHNORM, "convnext_tiny", "vit_b_16")
    for strategy in real_models.STRATEGIES
    if strategy != "fsdp sync" or name == BATCHNORM
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "strategy"), CELLS)
@pytest.mark.ranks(2, timeout=120)
def test_a_real_architecture_is_exact(name, strategy):
    outcome = real_models.judge(real_models.verify(name, strategy), expected=None)
    assert not outcome.surprise
    assert outcome.error is not None
