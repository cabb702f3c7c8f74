"Pre-activations of networks that make it hard, against values computed by hand; what capture leaves behind"
import copy

import pytest, timm, torch, torchvision
import torch.nn.functional as F
from fastai.vision.models.xresnet import xresnet18
from torch import nn

from phantom_nb.hooks import evaluating
from phantom_nb.measures.capture import capture, capture_with_outputs, find_activations
from phantom_nb.models import create_model

tv = torchvision.models
def images(n=4, size=32): return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))

def shake(net):
    "Batch normalization with statistics and weights that are not 0 and 1, so that before and after it differ"
    gen = torch.Generator().manual_seed(1)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, .1, generator=gen)
            m.running_var.uniform_(.5, 1.5, generator=gen)
            m.bias.data.normal_(0, .1, generator=gen)
    return net

class Functional(nn.Module):
    "One ReLU in place and three times, one functional, a method, one on the sum of a shortcut"
    def __init__(self):
        super().__init__()
        self.conv,self.bn,self.relu,self.fc = nn.Conv2d(3, 5, 3, padding=1),nn.BatchNorm2d(5),nn.ReLU(inplace=True),nn.Linear(5, 5)
    def forward(self, x):
        self.kept = []
        def keep(x):
            self.kept.append(x.detach().clone())
            return x
        a = self.relu(keep(self.bn(self.conv(x))))
        b = self.relu(keep(a-.5))
        c = F.relu(keep(b+a-1), inplace=True)
        c = keep(c-.1).relu_()
        d = torch.relu(keep(c-.2)).amax((2,3))
        return self.relu(keep(self.fc(d)))

def test_every_way_to_call_a_relu():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net,x = shake(Functional()),images()
    acts = capture(net, [x[:3], x[3:]])
    net.eval()(x)
    assert list(acts)==['relu','relu:2','relu:3','relu:4','relu:5','relu:6']
    want = [k.flatten(2).amax(2) if k.ndim==4 else k for k in net.kept]
    for a,w in zip(acts.values(), want, strict=True): assert torch.allclose(a, w, atol=1e-6)
    assert all((k<0).any() for k in net.kept)

def test_vgg_in_place_relu_keeps_what_was_before():
    net,x = shake(tv.vgg11_bn(num_classes=7)),images()
    acts = capture(net, [x])
    want,o = [],x
    with torch.no_grad():
        for m in net.eval().features:
            if isinstance(m, nn.ReLU): want.append(o.amax((2,3)).clone())
            o = m(o)
    assert [k for k in acts if k.startswith('features')]==[f'features.{i}' for i,m in enumerate(net.features) if isinstance(m, nn.ReLU)]
    assert all(torch.allclose(acts[f'features.{i}'], w, atol=1e-5) for i,w in zip([2,6,10,13,17,20,24,27], want, strict=True))
    assert acts['classifier.1'].shape==(4,4096) and any((w<0).any() for w in want)

NETWORKS = [(lambda: tv.resnet18(), 17, 'relu', 'layer4.1.relu:2'), (lambda: tv.densenet121(), 121, 'features.relu0', 'relu'),
    (lambda: tv.mobilenet_v3_small(), None, 'features.0.2', 'classifier.1'), (lambda: timm.create_model('resnet18'), 17, 'act1', None),
    (lambda: timm.create_model('efficientnet_b0'), None, 'bn1.act', 'bn2.act'), (lambda: xresnet18(), None, '0.2', None),
    (lambda: timm.create_model('convnext_atto'), 12, None, None), (lambda: create_model('wrn', 3), 13, 'stage1.0.relu1', 'relu'),
    (lambda: create_model('resnet18', 3), 17, 'relu', 'layer4.1.relu:2'), (lambda: tv.googlenet(aux_logits=False, init_weights=False), 57, None, None)]

@pytest.mark.parametrize('make,n,first,last', NETWORKS)
def test_networks(make, n, first, last):
    net,x = make().train(),images(3)
    before = copy.deepcopy(net.state_dict())
    acts = capture(net, [(x[:2], None), (x[2:], None)])
    table = find_activations(net, x[:1])
    assert list(acts)==list(table.index) and [a.shape for a in acts.values()]==[(3,u) for u in table.units]
    assert n in (None, len(acts)) and first in (None, list(acts)[0]) and last in (None, list(acts)[-1])
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items()) and net.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert not any(a.requires_grad for a in acts.values())

def test_convnext_has_its_channels_last():
    net = tv.convnext.ConvNeXt([tv.convnext.CNBlockConfig(8, 12, 1), tv.convnext.CNBlockConfig(12, None, 2)])
    assert find_activations(net, images(1)).units.tolist()==[32,48,48]
    assert find_activations(timm.create_model('convnext_atto'), images(1)).units.tolist()[:2]==[160,160]

@pytest.mark.parametrize('name,units', [('eva02_tiny_patch14_224', {512}), ('pvt_v2_b0', {256, 512, 640, 1024}), ('densenet121', None)])
def test_tokens_are_no_units(name, units):
    "Something may stand between a layer and its activation: a gate, a map of tokens, normalization, a concatenation"
    net = timm.create_model(name, pretrained=False, num_classes=10)
    df = find_activations(net, images(2, net.default_cfg['input_size'][-1]))
    if units: assert set(df.units)==units
    else: assert set(df['map'])<={'112×112', '56×56', '28×28', '14×14', '7×7'} and df.units.max()==1024

def test_normalization_over_whole_maps_leaves_channels_first():
    df = find_activations(nn.Sequential(nn.Conv2d(3, 8, 3), nn.LayerNorm([8,6,6]), nn.ReLU()), images(2, 8))
    assert (df.units.item(), df['map'].item())==(8, '6×6')

def test_batches_do_not_matter():
    net,x = shake(tv.resnet18()),images(5)
    one,many = capture(net, [x]),capture(net, x.split(2))
    assert all(torch.allclose(one[k], many[k], atol=1e-5) for k in one)

def test_frozen_modules_stay_frozen():
    net = tv.resnet18().train()
    net.bn1.eval()
    capture(net, [images(2)])
    assert net.training and not net.bn1.training and net.layer1[0].bn1.training

class Bad(nn.Module):
    def forward(self, x): raise KeyboardInterrupt

@pytest.mark.parametrize('exception,net', [(KeyboardInterrupt, nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), Bad())),
    (RuntimeError, nn.Sequential(nn.ReLU(), nn.Conv2d(9, 2, 1)))], ids=['interrupt','shape'])
def test_nothing_stays_behind_after_an_exception(exception, net):
    net.train()
    with pytest.raises(exception): capture(net, [images(2)])
    assert all(m.training for m in net.modules()) and not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert torch.is_grad_enabled()

@pytest.mark.parametrize('wrap', [lambda m: torch.compile(m, backend='eager'), nn.DataParallel, lambda m: m.compile(backend='eager') or m],
    ids=['compiled','parallel','compiled in place'])
def test_wrapped_models(wrap):
    net,x = shake(create_model('small_cnn', 3, size=32, seed=0)).eval(),images()
    want = capture(net, [x])
    wrapped = wrap(net)
    wrapped(x)
    got = capture(wrapped, [x])
    assert list(got)==list(want) and all(torch.equal(got[k], want[k]) for k in want)
    wrapped(x)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_float_type_is_the_networks(dtype):
    net = create_model('small_cnn', 3, size=32).to(dtype)
    assert {a.dtype for a in capture(net, [images().to(dtype)]).values()}=={dtype}

@pytest.mark.parametrize('layers,want', [('layer1.*', ['layer1.0.relu','layer1.0.relu:2','layer1.1.relu','layer1.1.relu:2']), ('relu', ['relu']),
    (['relu','layer4.1.relu:2'], ['relu','layer4.1.relu:2']), (lambda n,m: n.startswith('layer3.0'), ['layer3.0.relu','layer3.0.relu:2'])])
def test_layers_are_chosen(layers, want): assert list(capture(tv.resnet18(), [images(2)], layers))==want

def test_layers_by_type(): assert len(capture(tv.mobilenet_v3_small(), [images(2)], nn.ReLU)) < len(capture(tv.mobilenet_v3_small(), [images(2)]))

@pytest.mark.parametrize('net,batches,layers,message', [(nn.Conv2d(3, 2, 1), [images()], None, 'no activation function'),
    (tv.resnet18(), [], None, 'no batches'), (tv.resnet18(), [images()], 'head', "'relu', 'layer1.0.relu'"),
    (tv.resnet18(), [dict(x=images())], None, 'a batch of dict')])
def test_refused_with_a_sentence(net, batches, layers, message):
    with pytest.raises(ValueError, match=message): capture(net, batches, layers)

def test_a_layer_that_some_batches_skip_is_refused():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu,self.fc,self.extra = nn.ReLU(),nn.Linear(4, 4),nn.ReLU()
        def forward(self, x):
            x = self.relu(self.fc(x))
            return self.extra(x) if len(x)>2 else x
    with pytest.raises(ValueError, match="'extra' saw 3 of 5"): capture(Sometimes(), [torch.randn(3, 4), torch.randn(2, 4)])

def test_evaluating_restores_gradient_mode_and_stance():
    net = create_model('small_cnn').train()
    with evaluating(net) as m: assert not m.training and not torch.is_grad_enabled()
    assert net.training and torch.is_grad_enabled()

class TwoHeads(nn.Module):
    "Two outputs; its functions are called by a module without children, a linear one first"
    def __init__(self):
        super().__init__()
        self.leaf = Leaf()
    def forward(self, x): return self.leaf(x),x

class Leaf(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.eye(4))
    def forward(self, x): return F.relu(F.linear(x, self.w))

def test_linear_functions_do_not_count_in_the_names_of_activations():
    x = torch.randn(6, 4)
    acts,out = capture_with_outputs(TwoHeads(), [x[:2], x[2:]])
    assert list(acts)==['leaf'] and torch.equal(acts['leaf'], x) and torch.equal(out, x.relu())

@pytest.mark.parametrize('bs', [1, 2])
def test_activations_outside_the_network_are_none_of_its_own(bs):
    "Batches that are made by a generator, with activation functions of its own"
    net,x = create_model('small_cnn', 3, size=32),images()
    assert list(capture(net, (F.relu(part) for part in x.split(bs))))==list(capture(net, [x]))

def test_the_table_says_how_large_the_maps_are():
    class Net(nn.Module):
        "A map, tokens behind a linear layer, and units"
        def __init__(self):
            super().__init__()
            self.conv,self.fc = nn.Conv2d(3, 4, 3),nn.Linear(4, 5)
        def forward(self, x):
            x = self.fc(F.relu(self.conv(x)).flatten(2).mT)
            return F.relu(F.gelu(x).mean(1))
    table = find_activations(Net(), torch.randn(2, 3, 6, 9))
    assert table.units.tolist()==[4,5,5] and table['map'].tolist()==['4×7','28','']

def test_values_have_no_graph_even_where_the_network_makes_one():
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv,self.relu = nn.Conv2d(3, 4, 3),nn.ReLU()
        @torch.enable_grad()
        def forward(self, x): return self.relu(self.conv(x))
    acts,out = capture_with_outputs(Graph(), [images()])
    assert not acts['relu'].requires_grad and not out.requires_grad
