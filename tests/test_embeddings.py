"Embeddings: the head of known networks, what goes into it, and measures of how classes lie"
import warnings
from contextlib import suppress

import pytest, torch
from fastai.vision.learner import create_head
from hypothesis import given, settings, strategies as st
from torch import nn

from phantom_nb.data import get_dls
from phantom_nb.measures.embeddings import (apply_head, as_embeddings, class_means, directions, embedding_metrics, embeddings_of, find_head,
    check_batch, class_margins, interclass_similarity, lookalike_margin, lookalike_pairs, nearest_class_similarity, refuse_if, watch_head,
    within_class_share)
from phantom_nb.measures.sparsity import measure_sparsity
from phantom_nb.models import MODELS, create_model

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=14)
def gen(seed=0): return torch.Generator().manual_seed(seed)
def batch(labels, d=6, seed=0): return torch.randn(len(labels), d, generator=gen(seed), dtype=torch.float64), torch.tensor(labels)


# Heads

def torchvision_model(name, **kw):
    import torchvision
    with torch.device('meta'): return getattr(torchvision.models, name)(num_classes=10, **kw)

HEADS = dict(resnet18='fc', vgg11_bn='classifier.6', mobilenet_v3_small='classifier.3', efficientnet_b0='classifier.1', vit_b_16='heads.head',
    convnext_tiny='classifier.2', squeezenet1_1='classifier.1', swin_t='head', densenet121='classifier', shufflenet_v2_x0_5='fc')

@pytest.mark.parametrize('name', HEADS)
@pytest.mark.parametrize('n_out', [10, None])
def test_head_of_torchvision_models(name, n_out): assert find_head(torchvision_model(name), n_out=n_out)[0]==HEADS[name]

@pytest.mark.parametrize('name,head', [('resnet18','fc'), ('convnext_atto','head.fc'), ('vit_tiny_patch16_224','head'), ('mobilenetv3_small_050','classifier'),
    ('efficientnet_b0','classifier'), ('swin_tiny_patch4_window7_224','head.fc')])
def test_head_of_timm_models(name, head):
    timm = pytest.importorskip('timm')
    with torch.device('meta'): model = timm.create_model(name, num_classes=7)
    assert find_head(model, n_out=7)==(head, model.get_submodule(head))

@pytest.mark.parametrize('name', MODELS)
def test_head_of_our_models(name):
    model = create_model(name, 3, 10, 32, seed=0)
    assert find_head(model, n_out=10)[1]==[m for m in model.modules() if isinstance(m, nn.Linear)][-1]

def test_head_of_a_fastai_learner_and_of_wrappers():
    body = nn.Sequential(nn.Conv2d(3, 512, 3))
    model = nn.Sequential(body, create_head(512, 5))
    name,head = find_head(model, n_out=5)
    assert name=='1.8' and head.out_features==5 and find_head(nn.DataParallel(model), n_out=5)[1] is head
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert find_head(torch.compile(model), n_out=5)==(name, head)

def test_a_hidden_layer_as_wide_as_the_classes_is_no_rival():
    mlp = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(9, 4), nn.ReLU()), nn.Linear(4, 4))
    assert find_head(mlp, n_out=4)[0]=='2'

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.body,self.a,self.b = nn.Linear(64, 8),nn.Linear(8, 10),nn.Linear(8, 10, bias=False)
    def forward(self, x): return self.a(self.body(x.flatten(1)).relu())

def distilled():
    timm = pytest.importorskip('timm')
    with torch.device('meta'): return timm.create_model('deit_tiny_distilled_patch16_224', num_classes=10)

@pytest.mark.parametrize('make,n_out,what', [(Two, 10, "could be the classifier: 'a' (10), 'b' (10)"), (lambda: torchvision_model('googlenet', aux_logits=True), 10, "'aux1.fc2' (10)"),
    (distilled, 10, "'head' (10), 'head_dist' (10)"), (lambda: nn.Sequential(nn.Conv2d(3, 10, 3)), 10, 'no layer'), (lambda: nn.Sequential(nn.Linear(3, 4)), 10, "there are: '0' (4)"),
    (lambda: nn.ReLU(), None, 'there are: none')], ids=['two','auxiliary','distilled','conv','width','nothing'])
def test_two_heads_or_none_name_the_remedy(make, n_out, what):
    with pytest.raises(ValueError) as e: find_head(make(), n_out=n_out)
    assert what in str(e.value) and 'head=' in str(e.value)

def test_a_head_that_is_named():
    net = Two()
    assert find_head(net, 'b')[1] is net.b is find_head(net, net.b)[1] is find_head(net, 'output')[1] and find_head(net, lambda k,m: k=='a')[0]=='a'
    with pytest.raises(ValueError, match="head='\\[ab\\]' selects 2 layers"): find_head(net, '[ab]')
    with pytest.raises(ValueError, match="head='c' selects 0 layers of Two: name one of 'body' \\(8\\), 'a' \\(10\\)"): find_head(net, 'c')
    with pytest.raises(ValueError, match="head=5: give the name"): find_head(net, 5)
    vgg = torchvision_model('vgg11_bn')
    assert find_head(vgg, 'classifier')==('classifier', vgg.classifier)

@pytest.mark.parametrize('head,shape,applied', [(nn.Linear(6, 3, bias=False), (4,6), (4,6)), (nn.Conv2d(6, 3, 1), (4,6,2,5), (4,6)), (nn.Linear(6, 3), (4,7,6), (4,6))], ids=['linear','conv','tokens'])
def test_inputs_of_heads_become_embeddings(head, shape, applied):
    x = torch.randn(*shape, generator=gen())
    z = as_embeddings(x, head)
    assert z.shape==applied
    out = head(x)
    out = out.flatten(2).mean(2) if out.ndim==4 else out.flatten(1, -2).mean(1) if out.ndim==3 else out
    torch.testing.assert_close(apply_head(head, z), out)

@pytest.mark.parametrize('head,shape,axes', [(nn.Linear(6, 3), (4,5,7,6), (1, 2)), (nn.Sequential(nn.LayerNorm(6), nn.Flatten()), (4,2,2,6), (1, 2)),
    (nn.Sequential(nn.Conv1d(4, 3, 3)), (4,4,14), (2,)), (nn.Sequential(nn.BatchNorm2d(5), nn.ReLU()), (4,5,7,6), (2, 3)),
    (nn.AdaptiveAvgPool2d(1), (4,5,7,6), (2, 3))], ids=str)
def test_maps_are_averaged_over_positions(head, shape, axes):
    "Wherever the layer says that its channels are"
    x = torch.randn(*shape, generator=gen())
    torch.testing.assert_close(as_embeddings(x, head), x.mean(axes))
    with pytest.raises(ValueError, match='name a head that reads'): as_embeddings(torch.randn(4, 2, 2, 6), nn.Sequential(nn.Linear(24, 3)))

def test_margin_of_given_pairs_is_of_those_present():
    z,y = torch.randn(60, 5, generator=gen()),torch.arange(60)%4
    pairs = lookalike_pairs(z, y, 1.)
    for gone in (3, 0):
        there = y!=gone
        margins = class_margins(z[there], y[there], 4)
        want = torch.stack([margins[a, b] for a in range(4) for b in range(4) if a!=b and gone not in (a, b)]).mean()
        torch.testing.assert_close(lookalike_margin(z[there], y[there], pairs), want)

def test_a_head_that_reads_maps_is_refused():
    with pytest.raises(ValueError, match='name a head that reads'): as_embeddings(torch.ones(2, 3, 4), nn.Flatten())


# Reading and measuring

def test_reading_leaves_modes_hooks_and_wrappers_alone():
    net = create_model('small_cnn', size=8, seed=0).train()
    net.stage1.eval() if hasattr(net, 'stage1') else next(net.children()).eval()
    modes = [m.training for m in net.modules()]
    dl = get_dls('digits', n_train=40, n_valid=30, seed=0, device='cpu').valid
    z,logits,y = embeddings_of(nn.DataParallel(net), dl)
    assert [m.training for m in net.modules()]==modes and z.shape==(30,64) and logits.shape==(30,10) and len(y)==30
    torch.testing.assert_close(net.head.fc(z), logits)
    with pytest.raises(RuntimeError):
        with watch_head(net): raise RuntimeError
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    with pytest.raises(ValueError, match='gives no batch'): embeddings_of(net, [])

def test_compiled_network_gives_the_same_embeddings():
    torch._dynamo.reset()
    net = create_model('small_cnn', size=8, seed=0)
    dl = get_dls('digits', n_train=40, n_valid=30, seed=0, device='cpu').valid
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for a,b in zip(embeddings_of(torch.compile(net, backend='eager'), dl), embeddings_of(net, dl)): torch.testing.assert_close(a, b)

@settings(max_examples=40, deadline=None)
@given(LABELS)
def test_measures_are_the_loops(labels):
    z,y = batch(labels)
    cos = lambda a, b: (a@b/(a.norm()*b.norm())).item()
    means = {c:z[y==c].mean(0) for c in set(labels)}
    pairs = [cos(means[a], means[b]) for a in means for b in means if a!=b]
    near = [max(cos(z[i], m) for c,m in means.items() if c!=own) for i,own in enumerate(labels)] if len(means)>1 else []
    u = z/z.norm(dim=1, keepdim=True)
    within = sum((u[i]-u[y==c].mean(0)).square().sum().item() for i,c in enumerate(labels))
    assert abs(interclass_similarity(z, y).item()-sum(pairs)/max(1, len(pairs)))<1e-9
    assert abs(nearest_class_similarity(z, y).item()-sum(near)/max(1, len(near)))<1e-9
    assert abs(within_class_share(z, y).item()-within/max(1e-12, (u-u.mean(0)).square().sum().item()))<1e-9

def test_classes_that_are_left_out_and_empty_batches():
    z,y = batch([-100,-100,1,1])
    means,present = class_means(z, y, 3)
    assert present.tolist()==[False,True,False]
    torch.testing.assert_close(means[1], z[2:].mean(0))
    empty = torch.zeros(0, 4),torch.zeros(0, dtype=torch.long)
    assert all(f(*empty)==0 for f in (interclass_similarity,nearest_class_similarity,within_class_share))
    assert directions(torch.zeros(1, 3)).tolist()==[[0,0,0]]
    for f in (interclass_similarity,nearest_class_similarity,within_class_share):
        with pytest.raises(ValueError, match='one row a sample'): f(torch.ones(3), torch.arange(3))
        with pytest.raises(ValueError, match='float32'): f(torch.ones(3, 2), torch.ones(3))

@settings(max_examples=40, deadline=None)
@given(LABELS)
def test_margins_are_the_loops(labels):
    z,y = batch(labels)
    cos = lambda a, b: (a@b/(a.norm()*b.norm())).item()
    means = {c:z[y==c].mean(0) for c in set(labels)}
    def margin(c, other): return sum(cos(v, means[c])-cos(v, means[other]) for v in z[y==c])/(y==c).sum().item()
    m = class_margins(z, y, 6)
    assert m.shape==(6,6) and all(abs(m[c,d].item()-(margin(c, d) if c in means and d in means else 0.))<1e-9 for c in range(6) for d in range(6))
    ranked = sorted(((cos(means[a], means[b]),a,b) for a in means for b in means if a<b), reverse=True)
    chosen = ranked[:-(-len(ranked)//10)]
    expected = [margin(a, b) for _,a,b in chosen]+[margin(b, a) for _,a,b in chosen]
    assert lookalike_pairs(z, y).sum().item()==len(expected) and abs(lookalike_margin(z, y).item()-sum(expected)/max(1, len(expected)))<1e-9

def test_pairs_that_are_given_are_those_that_are_measured():
    z,y = batch([0,0,1,1,2,2])
    pairs = torch.zeros(3, 3, dtype=torch.bool)
    pairs[0,1] = pairs[1,0] = True
    m = class_margins(z, y)
    assert abs(lookalike_margin(z, y, pairs).item()-((m[0,1]+m[1,0])/2).item())<1e-12
    assert lookalike_pairs(z, y, 1.).sum()==6
    with pytest.raises(ValueError, match='share=0'): lookalike_pairs(z, y, 0)

def test_measures_at_their_extremes():
    y = torch.arange(12)%3
    corners = torch.eye(3)[y]
    simplex = corners-1/3
    assert interclass_similarity(corners, y)==0 and abs(interclass_similarity(simplex, y)+.5)<1e-6 and abs(interclass_similarity(torch.ones(12, 3), y)-1)<1e-6
    assert abs(nearest_class_similarity(simplex, y)+.5)<1e-6 and within_class_share(corners, y)<1e-6
    near = torch.tensor([[1.,0.],[1.,0.],[0.,1.]])
    assert abs(nearest_class_similarity(near, torch.tensor([0,1,2]))-2/3)<1e-6
    assert abs(within_class_share(torch.tensor([[1.,0.],[0.,1.]]*2), torch.tensor([0,0,1,1]))-1)<1e-6
    assert interclass_similarity(torch.ones(3, 2), torch.zeros(3, dtype=torch.long))==0
    m = embedding_metrics(corners, corners.roll(1, 0), y)
    assert m['confusion']==[[0,0,4],[4,0,0],[0,4,0]] and embedding_metrics(corners, torch.ones(12, 21), y).keys()=={'similarity','nearest','within','margin'}

# What broken code has shown to be untested

def test_long_lists_of_layers_are_cut_to_the_last_eight():
    model = nn.ModuleDict({f'l{i}':nn.Linear(4, 2+i) for i in range(11)})
    with pytest.raises(ValueError) as e: find_head(model, n_out=99)
    assert "there are: ..., 'l3' (5), " in str(e.value) and "'l10' (12)" in str(e.value) and "'l2'" not in str(e.value)

def test_the_head_passes_gradients_and_watching_it_keeps_none():
    head,z = nn.Linear(3, 2),torch.randn(4, 3, generator=gen(), requires_grad=True)
    assert (torch.autograd.grad(apply_head(head, z).sum(), z)[0]==head.weight.sum(0)).all()
    net = nn.Sequential(head)
    with watch_head(net) as seen: net(z)
    assert [t.requires_grad for t in seen[0]]==[False, False]

def test_classes_are_computed_in_64_bits():
    assert check_batch(torch.ones(2, 3), torch.arange(2, dtype=torch.int8))[1].dtype==torch.long

def test_a_gpu_is_told_to_stop_by_itself(monkeypatch):
    "One wrong label among right ones; the device gets the condition, and nobody waits"
    told = []
    monkeypatch.setattr(torch, '_assert_async', lambda right, message: told.append((right.shape, right.device.type)))
    class Wrong:
        "A tensor on a device"
        device = torch.device('cuda')
        def __init__(self, x): self.x = x
        def any(self): return self.x.any()
    refuse_if(Wrong(torch.tensor([True, False])), 'no')
    assert told==[(torch.Size([]), 'cpu')]
    monkeypatch.setattr(torch, '_assert_async', lambda right, message: told.append(right.item()))
    for wrong in ([True, False], [False, False]): refuse_if(Wrong(torch.tensor(wrong)), 'no')
    assert told[1:]==[False, True]

def test_wrong_labels_of_many_classes_are_refused_too():
    z,y = batch([0,1,2,30])
    with pytest.raises(ValueError, match='class 30, n_classes=25: classes are 0 to 24'): embedding_metrics(z, torch.ones(4, 25), y)

def test_pairs_that_look_alike_are_those_with_the_highest_cosines():
    m = torch.tensor([[1.,0.,0.], [.9,.1,0.], [0.,1.,0.], [0.,0.,1.]])
    assert lookalike_pairs(m, torch.arange(4)).nonzero().tolist()==[[0,1],[1,0]]

@pytest.mark.parametrize('dtype', [torch.uint8, torch.int32])
def test_the_margin_of_given_pairs_takes_any_whole_type(dtype):
    z,y = torch.randn(12, 4),torch.arange(12)%3
    pairs = lookalike_pairs(z, y)
    assert lookalike_margin(z, y.to(dtype), pairs)==lookalike_margin(z, y, pairs)

def test_inputs_may_be_several():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)
        def forward(self, x): return self.fc(x[0]+x[1])
    batches = [((torch.randn(3, 4), torch.randn(3, 4)), torch.tensor([0,1,1]))]
    assert embeddings_of(Two(), batches)[0].shape==(3, 4)

def test_batches_go_where_the_network_is():
    "The meta device stands for a GPU"
    net = nn.Sequential(nn.Flatten(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)).to('meta')
    batches = [(torch.randn(3, 8), torch.tensor([0,1,1]))]*2
    assert {t.device.type for t in embeddings_of(net, batches)}=={'meta'}
    seen = []
    net[1].register_forward_pre_hook(lambda _,args: seen.append(args[0].device.type))
    with suppress(Exception): measure_sparsity(net, batches) # numbers there are none
    assert seen and set(seen)=={'meta'}
