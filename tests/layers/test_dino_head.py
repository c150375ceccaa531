import pytest
import torch
from support.golden import golden_shapes

from dinov2.layers.dino_head import DINOHead, PrototypeLayer


@pytest.mark.parametrize(("family", "weight_norm"), [("dinov2", True), ("dinov3", False)])
def test_names_and_shapes_are_the_official_ones(family, weight_norm):
    with torch.device("meta"):
        head = DINOHead(384, 65536, weight_norm=weight_norm)
    assert {name: tuple(p.shape) for name, p in head.state_dict().items()} == golden_shapes(
        f"{family}_head(in_dim=384,out_dim=65536)"
    )


@pytest.mark.parametrize("weight_norm", [True, False])
@pytest.mark.parametrize(("nlayers", "use_bn"), [(1, False), (2, False), (3, True), (4, False)])
def test_init_weights_sets_every_parameter(nlayers, use_bn, weight_norm):
    head = DINOHead(8, 20, nlayers=nlayers, use_bn=use_bn, hidden_dim=6, bottleneck_dim=4, weight_norm=weight_norm)
    for param in head.parameters():
        torch.nn.init.constant_(param, float("nan"))
    head.init_weights(torch.Generator().manual_seed(0))
    assert all(torch.isfinite(param).all() for param in head.parameters())
    assert head(torch.randn(5, 8)).shape == (5, 20)


def test_prototypes_and_their_gradients_equal_those_of_torch_weight_norm():
    layer = PrototypeLayer(6, 5000).double()  # more rows than are summed at a time
    layer.init_weights(torch.Generator().manual_seed(0))
    torch.nn.init.uniform_(layer.weight_g, 0.5, 2.0)
    reference = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(6, 5000, bias=False).double())
    reference.parametrizations.weight.original0.data.copy_(layer.weight_g)
    reference.parametrizations.weight.original1.data.copy_(layer.weight_v)
    x = torch.randn(7, 6, dtype=torch.float64)
    layer(x).square().sum().backward()
    reference(x).square().sum().backward()
    torch.testing.assert_close(layer.weight_g.grad, reference.parametrizations.weight.original0.grad)
    torch.testing.assert_close(layer.weight_v.grad, reference.parametrizations.weight.original1.grad)


def test_plain_prototypes_start_small_and_are_the_weight_itself():
    head = DINOHead(8, 5000, hidden_dim=6, bottleneck_dim=4, weight_norm=False)
    head.init_weights(torch.Generator().manual_seed(0))
    weight = head.last_layer.weight
    assert head.last_layer.prototypes() is weight
    # The cut at 2 is far away, so the spread is the normal one; 20,000 draws give it to about 1 %.
    assert weight.std().item() == pytest.approx(0.02, rel=0.02) and abs(weight.mean().item()) < 1e-3


@pytest.mark.parametrize("weight_norm", [True, False])
def test_a_criterion_gets_unit_features_and_prototypes(weight_norm):
    head = DINOHead(8, 20, hidden_dim=6, bottleneck_dim=4, weight_norm=weight_norm)
    head.init_weights()
    x = torch.randn(5, 8)
    features, prototypes = head(x, lambda features, prototypes: (features, prototypes))
    torch.testing.assert_close(features.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(features @ prototypes.T, head(x))
