"The papers' networks: published sizes, shapes, factors, seeds, and refusals that say what to do."
import copy, pickle

import pytest, torch, torchvision
from torch import nn
from torch.nn import functional as F

from phantom_nb.models import MODELS, PreActBlock, Residual, cnn9, create_model, model_stats, resnet18, resnet9, small_cnn, vgg, wrn

NAMES = list(MODELS)
ANY = {8,16,28,32,48}
READS = dict(small_cnn=ANY, plain_cnn=ANY, resnet9=ANY, cnn9={32}, vgg=ANY-{8}, wrn=ANY, resnet18=ANY)
# thin copies of the slow networks, where only structure matters
THIN = dict(small_cnn={}, plain_cnn={}, resnet9=dict(width=.25), cnn9=dict(width=.125), vgg=dict(width=.125), wrn=dict(width=.25), resnet18={})


def gen(seed=0): return torch.Generator().manual_seed(seed)
def images(b, c, h, w=None): return torch.randn(b, c, h, w or h, generator=gen())
def convs(net): return [m for m in net.modules() if isinstance(m, nn.Conv2d)]

def n_params(build, *args, **kwargs):
    "Count parameters without making any."
    with torch.device('meta'): return sum(p.numel() for p in build(*args, **kwargs).parameters())


@pytest.mark.parametrize('build,kw,n', [
    (resnet18, {}, 11_173_962),                          # the count quoted for ResNet-18 on CIFAR-10
    (resnet18, dict(n_out=100), 11_220_132),
    (resnet9, {}, 1_646_122),                            # 1.65 million at width 32
    (resnet9, dict(width=64), 6_573_130),                # Page's 6.57 million, and the classifier's bias
    (wrn, dict(blocks=4, widen=10), 36_479_194),         # Zagoruyko & Komodakis: 36.5M
    (wrn, dict(blocks=2, widen=8), 10_961_370),          # 11.0M
    (wrn, dict(blocks=6, widen=4), 8_949_210),           # 8.9M
    (wrn, dict(blocks=6, widen=1), 563_930)])            # 0.6M
def test_published_sizes(build, kw, n): assert n_params(build, **kw)==n

def test_vgg_has_torchvisions_convolutions():
    assert n_params(vgg, n_out=7) - 513*7 == n_params(lambda: torchvision.models.vgg13_bn().features)
    assert len(convs(vgg(width=.05, depth=1.5)))==15

def test_cnn9_by_hand():
    k3 = 9*(3*64 + 2*64*64 + 64*128 + 2*128*128 + 128*256 + 2*256*256)
    assert n_params(cnn9)==k3 + 6*(64+128+256) + 16*256*256 + 256*100
    assert n_params(cnn9, bn=False)==k3 + 3*(64+128+256) + 16*256*256 + 256*100

def test_cnn9_is_the_authors_graph():
    "Conv, BN (eps 1e-3) and ReLU thrice, pool, thrice; then a bare 4×4 convolution and a bare classifier."
    net = cnn9()
    kinds = [type(m) for m in net.modules() if not list(m.children()) and not isinstance(m, nn.Dropout)]
    stage = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]*3 + [nn.MaxPool2d]
    assert kinds==stage*3 + [nn.Conv2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear]
    assert [m.out_channels for m in convs(net)]==[64]*3 + [128]*3 + [256]*4
    assert all(m.bias is None for m in convs(net)) and net.head.fc.bias is None
    assert {m.eps for m in net.modules() if isinstance(m, nn.BatchNorm2d)}=={1e-3}
    assert (net.fc6.kernel_size, net.fc6.padding)==((4,4), (0,0))
    std = cnn9(n_out=400).head.fc.weight.std().item()
    assert abs(std/(2/256)**.5 - 1)<.02                  # He, counting connections in, as in the authors' code
    for m in convs(net)[1:]: assert abs(m.weight.std().item()/(2/m.weight[0].numel())**.5 - 1)<.03
    assert net.eval().fc6(net.stage3(net.stage2(net.stage1(images(2, 3, 32))))).shape==(2,256,1,1)

def test_small_cnn_is_small(): assert 30_000<=n_params(small_cnn)<=100_000


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('name', NAMES)
def test_shapes(name, channels):
    for s in (8, 16, 28, 32, 48):
        if s not in READS[name]:
            with pytest.raises(ValueError, match=rf'not {s}×{s}: .*small_cnn'): create_model(name, channels, size=s)
            continue
        net = create_model(name, channels, 7, s, **THIN[name]).eval()
        with torch.no_grad(): assert net(images(2, channels, s)).shape==(2,7)
        with torch.no_grad(): assert net(images(1, channels, s)).shape==(1,7)

@pytest.mark.parametrize('name', [n for n in NAMES if n!='cnn9'])
def test_not_square(name):
    net = create_model(name, 1, 3, (16,40), **THIN[name]).eval()
    with torch.no_grad(): assert net(images(2, 1, 16, 40)).shape==(2,3)

@pytest.mark.parametrize('name', NAMES)
def test_classifier_is_last(name):
    net = create_model(name, 3, 11, **THIN[name])
    last = [m for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
    assert isinstance(last, nn.Linear) and last.out_features==11
    assert sum(isinstance(m, nn.Linear) for m in net.modules())==1
    assert list(net.named_parameters())[-1][0].rsplit('.', 1)[0]==next(n for n,m in net.named_modules() if m is last)

@pytest.mark.parametrize('name', NAMES)
def test_gradient_reaches_every_parameter(name):
    net = create_model(name, 3, 10, seed=0, **THIN[name])
    F.cross_entropy(net(images(16, 3, 32)), torch.arange(16)%10).backward()
    dead = [n for n,p in net.named_parameters() if p.grad is None or not p.grad.abs().max()>1e-6]
    assert all(name=='vgg' and n.startswith('features') and n.endswith('bias') for n in dead), dead

def test_cnn9_without_bn_learns_through_its_biases():
    net = create_model('cnn9', 3, 10, seed=0, bn=False, width=.125)
    F.cross_entropy(net(images(16, 3, 32)), torch.arange(16)%10).backward()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    assert all(p.grad.abs().max()>0 for p in net.parameters())

@pytest.mark.parametrize('name', NAMES)
def test_no_activation_in_place(name):
    "What a hook saw before a ReLU is still there after the pass."
    net,seen = create_model(name, 3, seed=0, **THIN[name]).eval(),[]
    for m in net.modules():
        if isinstance(m, nn.Conv2d if name=='plain_cnn' else nn.BatchNorm2d): m.register_forward_hook(lambda m,i,o: seen.append((o, o.detach().clone())))
    net(images(2, 3, 32))
    assert seen and all(torch.equal(o, c) for o,c in seen)
    assert any((c<0).any() for _,c in seen)

@pytest.mark.parametrize('name', NAMES)
def test_same_values_in_channels_last_pickled_and_copied(name):
    net,x = create_model(name, 3, seed=0, **THIN[name]).eval(),images(4, 3, 32)
    with torch.no_grad():
        y = net(x)
        assert torch.equal(y, pickle.loads(pickle.dumps(net))(x)) and torch.equal(y, copy.deepcopy(net)(x))
        last = net.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, y, rtol=1e-3, atol=1e-3*y.abs().max().item())  # float32 sums in another order

@pytest.mark.parametrize('name', NAMES)
def test_eval_does_not_depend_on_the_batch(name):
    net,x = create_model(name, 3, seed=0, dropout=.5, **THIN[name]).eval(),images(4, 3, 32)
    with torch.no_grad(): y,y0 = net(x),net(x[:1])
    torch.testing.assert_close(y[:1], y0, rtol=1e-3, atol=1e-3*y.abs().max().item())

@pytest.mark.parametrize('name', NAMES)
def test_seed(name):
    kw = dict(n_in=3, **THIN[name])
    state = torch.get_rng_state()
    a,b,c = (create_model(name, seed=s, **kw).state_dict() for s in (3,3,4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not all(torch.equal(a[k], c[k]) for k in a)

def test_without_seed_the_global_generator_decides():
    with torch.random.fork_rng(devices=[]): nets = [(torch.manual_seed(s), small_cnn())[1] for s in (5,5,6)]
    a,b,c = (n.head.fc.weight for n in nets)
    assert torch.equal(a, b) and not torch.equal(a, c)

def test_rng_is_given_back_after_an_error():
    state = torch.get_rng_state()
    with pytest.raises(ValueError): create_model('small_cnn', dropout=3., seed=0)
    assert torch.equal(torch.get_rng_state(), state)

@pytest.mark.parametrize('name', [n for n in NAMES if n not in ('resnet18','resnet9')])
def test_factors(name):
    base = n_params(create_model, name, 3)
    assert 2<n_params(create_model, name, 3, width=1.5)/base<2.4           # about 1.5 squared
    assert 1.4<n_params(create_model, name, 3, depth=1.5)/base<1.8
    wide,deep = (create_model(name, 3, width=.5*w, depth=d) for w,d in ((1.5,1), (1,1.5)))
    plain = create_model(name, 3, width=.5)
    assert len(convs(wide))==len(convs(plain))<len(convs(deep))
    assert [m.out_channels for m in convs(wide)][1:]==[round(1.5*m.out_channels) for m in convs(plain)][1:]
    tiny = create_model(name, 3, width=1e-3, depth=1e-3)                   # never less than one channel, one layer
    assert min(m.out_channels for m in convs(tiny))>=1 and tiny.eval()(images(1, 3, 32)).shape==(1,10)

@pytest.mark.parametrize('name', NAMES)
def test_dropout_sits_where_it_should(name):
    net = create_model(name, 3, dropout=.5, seed=0, **THIN[name])
    drops = [n for n,m in net.named_modules() if isinstance(m, nn.Dropout) and m.p==.5]
    if name=='wrn': assert drops==[f'stage{i}.{j}.drop' for i in (1,2,3) for j in (0,1)]
    else:
        leaves = [m for m in net.modules() if not list(m.children())]
        assert len(drops)==1 and isinstance(leaves[-2], nn.Dropout) and isinstance(leaves[-1], nn.Linear)
    x = images(2, 3, 32)
    assert not torch.equal(net(x), net(x)) and torch.equal(net.eval()(x), net(x))

def test_resnet18_computes_what_torchvisions_does():
    ours,x = resnet18().eval(),images(2, 3, 32)
    theirs = torchvision.models.resnet18(num_classes=10).eval()
    theirs.conv1,theirs.maxpool,theirs.fc = ours.conv1,nn.Identity(),ours.fc
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad(): assert torch.equal(ours(x), theirs(x))

def test_identity_block():
    block,x = PreActBlock(4, 4),images(2, 4, 6)
    nn.init.zeros_(block.conv2.weight)
    assert torch.equal(block(x), x)
    assert PreActBlock(4, 6, stride=2)(images(2, 4, 7)).shape==(2,6,4,4)

@pytest.mark.parametrize('kw,say', [
    (dict(name='vgg16'), "unknown model 'vgg16': use one of small_cnn, plain_cnn, resnet9, cnn9, vgg, wrn, resnet18, timm:NAME or torchvision:NAME"),
    (dict(name='resnet18', width=2.), 'no option width=2.0: the networks that have it are small_cnn, plain_cnn, resnet9, cnn9, vgg, wrn'),
    (dict(name='resnet18', depth=.5), 'resnet18 has no option depth=0.5'),
    (dict(name='vgg', bn=True), 'vgg has no option bn=True: the networks that have it are small_cnn, cnn9'),
    (dict(name='small_cnn', widen=2), 'the networks that have it are wrn'),
    (dict(name='vgg', colour=1), 'its options are n_in, n_out, size, width, depth, dropout'),
    (dict(name='cnn9', size=28), 'cnn9 reads 32×32 images, not 28×28: pad or resize them to 32×32, or use small_cnn'),
    (dict(name='cnn9', size=(32,36)), 'not 32×36'),
    (dict(name='vgg', size=8), 'vgg reads images of 16×16 or more, not 8×8'),
    (dict(name='small_cnn', size=2), 'resize them to 4×4'),
    (dict(name='vgg', size='32'), "size='32': give a whole number of pixels, or a pair"),
    (dict(name='vgg', size=(32,)), 'give a whole number of pixels'),
    (dict(name='vgg', size=-32), 'size=-32'),
    (dict(name='wrn', n_out=0), 'n_out=0: give a whole number >= 1'),
    (dict(name='wrn', n_in=1.5), 'n_in=1.5'),
    (dict(name='wrn', blocks=0), 'blocks=0'),
    (dict(name='wrn', widen=-1), 'widen=-1'),
    (dict(name='vgg', width=0), 'width=0: give a number > 0'),
    (dict(name='vgg', depth=float('nan')), 'depth=nan'),
    (dict(name='vgg', dropout=1.5), 'dropout'),
])
def test_refusals(kw, say):
    with pytest.raises(ValueError) as e: create_model(**kw)
    assert say in str(e.value)

def test_one_is_not_an_unsupported_factor(): create_model('resnet18', width=1, depth=1.)

def test_model_stats():
    net,x = small_cnn(3).train(),images(4, 3, 32)
    before = copy.deepcopy(net.state_dict())
    macs = 9*(3*16*32*32 + (16*32 + 32*32)*16*16 + (32*64 + 64*64)*8*8) + 640
    assert model_stats(net, x)==dict(parameters=70_618, layers=6, macs=macs)
    assert net.training and all(torch.equal(v, before[k]) for k,v in net.state_dict().items())
    assert model_stats(net.eval(), x[:1])['macs']==macs and not net.training

# --- ResNet-9

def test_resnet9_is_pages_graph():
    net = resnet9()
    kinds = [type(m).__name__ for m in net.modules() if not list(m.children()) and not isinstance(m, nn.Dropout)]
    block = ['Conv2d','BatchNorm2d','ReLU']
    assert kinds==block*2 + ['MaxPool2d'] + block*3 + ['MaxPool2d'] + block + ['MaxPool2d'] + block*2 + ['AdaptiveMaxPool2d','Flatten','Linear'] \
        or sorted(kinds)==sorted(block*8 + ['MaxPool2d']*3 + ['AdaptiveMaxPool2d','Flatten','Linear'])
    assert [m.out_channels for m in convs(net)]==[32, 64, 64, 64, 128, 256, 256, 256]
    assert sum(isinstance(m, Residual) for m in net.modules())==2

def test_resnet9_has_a_width_in_channels_and_a_factor_in_create_model():
    assert convs(create_model('resnet9', 3, width=.5))[0].out_channels==16==convs(resnet9(width=16))[0].out_channels
    with pytest.raises(ValueError, match='width=0'): resnet9(width=0)
    with pytest.raises(ValueError, match='no option depth'): create_model('resnet9', depth=2)

def test_residual_adds():
    block,x = Residual(4).eval(),images(2, 4, 6)
    assert torch.equal(block(x), x + block.block2(block.block1(x)))

@pytest.mark.parametrize('norm', ['group','layer','none'])
def test_another_normalization_keeps_the_weights_and_looks_at_one_image(norm):
    batch,net = (create_model('resnet9', 3, seed=0, norm=o, width=.25).train() for o in ('batch', norm))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    assert all(map(torch.equal, batch.parameters(), net.parameters()))
    x = images(6, 3, 16)
    assert torch.allclose(net(x)[:2], net(x[:2]), atol=1e-4)

def test_normalization_is_refused_where_it_cannot_be_replaced(tmp_path):
    with pytest.raises(ValueError, match='no batch normalization'): create_model('plain_cnn', norm='layer')
    with pytest.raises(ValueError, match="norm='instance'"): create_model('resnet9', norm='instance')
    torch.save(create_model('small_cnn').state_dict(), tmp_path/'w.pt')
    with pytest.raises(ValueError, match="don't fit"): create_model('small_cnn', norm='layer', weights=tmp_path/'w.pt')

def test_a_network_of_ones_own_takes_its_weights_back_with_any_normalization(tmp_path):
    net = create_model('small_cnn', size=8, norm='group', seed=0)
    torch.save(net.state_dict(), tmp_path/'net.pth')
    same = create_model('small_cnn', size=8, norm='group', weights=tmp_path/'net.pth', seed=1)
    assert all(a.equal(b) for a,b in zip(net.state_dict().values(), same.state_dict().values()))
