"Data sets found, read and refused; subsets, splits and batches; what fastai does with the loaders."
import copy, gzip, multiprocessing, os, pickle, random, struct, warnings
os.environ.setdefault('MPLBACKEND', 'agg')
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np, pytest, torch, torchvision
import torch.nn.functional as F
from fastai.callback.mixup import CutMix, MixUp
from fastai.interpret import ClassificationInterpretation
from fastai.learner import Learner, load_learner
from fastai.metrics import accuracy
from fastai.torch_core import TensorImage
from fastai.callback.progress import ProgressCallback
import fastai.callback.schedule # chkstyle: ignore
from hypothesis import given, settings, strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from phantom_nb.data import loaders, long_tail, noisy_labels, readers
from phantom_nb.data import (Augment, DATASETS, ImageData, ImageDL, ImageLoaders, ImageSet, available, balanced_subset,
    channel_stats, get_dls, load_dataset, read_idx, split_pool)

SCANS = load_digits().images

@pytest.fixture(autouse=True)
def isolated(tmp_path_factory, monkeypatch):
    "No data set but `digits` can be found, and no cache is shared with the user"
    home = tmp_path_factory.mktemp('home')
    monkeypatch.setenv('XDG_CACHE_HOME', str(home/'cache'))
    monkeypatch.setenv('TORCH_HOME', str(home/'torch'))
    monkeypatch.delenv('PHANTOM_NB_DATA', raising=False)
    monkeypatch.setattr(readers, 'SYSTEM_FOLDER', str(home/'system'))
    return home

@pytest.fixture(scope='module')
def digits(): return load_dataset()

def scan(i, size=32):
    "The `i`-th digit, as (size,size,3) uint8 in a colour of its own"
    im = Image.fromarray((SCANS[i]*15.9).astype('uint8')).resize((size, size), Image.NEAREST)
    return np.asarray(im)[:,:,None] // np.array([1, 1 + i%3, 1 + i%5], dtype='uint8')

def make_tree(root, name, ext='png', train=3, test=2, nested=False, size=32):
    "An image-folder tree of digits under the class names of `name`; returns {split: {class: arrays}}"
    sup = {c: s for s, cs in DATASETS[name].coarse.items() for c in cs}
    made, i = {}, 0
    for split, n in dict(train=train, test=test).items():
        for c in reversed(DATASETS[name].classes):
            d = root/split/(sup[c] if nested else '')/c
            d.mkdir(parents=True)
            for k in range(n):
                a = scan(i, size)
                Image.fromarray(a).save(d/f'{k}.{ext}', compress_level=0)  # all files of one size
                made.setdefault(split, {}).setdefault(c, []).append(a)
                i += 1
    return made

def tagged(n_train=200, n_test=60, c=10, size=8):
    "A data set whose every image carries its own number in its first two pixels"
    def split(n, start):
        x, num = torch.zeros(n, 1, size, size, dtype=torch.uint8), torch.arange(start, start+n)
        x[:,0,0,0], x[:,0,0,1] = num//256, num%256
        x[:,0,1:] = torch.randint(0, 256, (n,size-1,size), generator=torch.Generator().manual_seed(start))
        return x, torch.arange(n) % c
    return ImageData.create('digits', split(n_train, 0), split(n_test, 10_000), 'made up')

def numbers(x): return (x[:,0,0,0].long()*256 + x[:,0,0,1]).tolist()
def raw(dl, xb): return (xb*dl.dataset.scale + dl.dataset.shift).round().to(torch.uint8)
def seen(dl): return [n for b in dl for n in numbers(raw(dl, b[0]))]
def linear(dls): return nn.Sequential(nn.Flatten(), nn.Linear(dls.train_ds.x[0].numel(), dls.c))
def learner(dls, **kw): return Learner(dls, linear(dls), metrics=accuracy, **kw).remove_cb(ProgressCallback)
def same(a, b): return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- what is fixed about a data set

def test_cifar100_superclasses_are_the_published_ones():
    published = [4,1,14,8,0,6,7,7,18,3,3,14,9,18,7,11,3,9,7,11,6,11,5,10,7,6,13,15,3,15,0,11,1,10,12,14,16,9,11,5,5,19,8,8,
        15,13,14,17,18,10,16,4,17,4,2,0,17,4,18,17,10,3,2,12,12,16,12,1,9,19,2,10,0,1,16,12,9,13,15,13,16,19,2,4,6,19,5,5,8,
        19,18,1,2,15,6,0,17,8,14,13]
    spec = DATASETS['cifar100']
    sup = {c: i for i, cs in enumerate(spec.coarse.values()) for c in cs}
    assert [sup[c] for c in spec.classes] == published
    assert list(spec.coarse) == sorted(spec.coarse)

@pytest.mark.parametrize('name', DATASETS)
def test_every_class_has_one_superclass(name):
    spec = DATASETS[name]
    assert sorted(sum(spec.coarse.values(), [])) == sorted(spec.classes)

def test_digits_split(digits):
    assert digits.x_train.shape == (1000,1,8,8) and digits.x_test.shape == (797,1,8,8)
    assert digits.y_train.bincount().tolist() == [100]*10
    assert digits.x_train.dtype == torch.uint8 and digits.y_train.dtype == torch.int64
    want = Counter(np.round(o*255/16).astype('uint8').tobytes() for o in SCANS)
    assert Counter(o.numpy().tobytes() for o in torch.cat([digits.x_train, digits.x_test])) == want
    assert digits.coarse.tolist() == [0,1]*5 and digits.coarse_names == ['even', 'odd']
    assert '1000/797' in digits.source
    y = load_digits().target
    for c in range(10):  # evenly along the file: any 18 neighbours of a class hold 9 to 11 training images
        xs = {o.numpy().tobytes() for o in digits.x_train[digits.y_train == c]}
        own = [np.round(o*255/16).astype('uint8').tobytes() in xs for o in SCANS[y == c]]
        runs = np.convolve(own, np.ones(18), 'valid')
        assert 9 <= runs.min() and runs.max() <= 11

@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**31))
def test_channel_stats(n, c, seed):
    x = torch.randint(0, 256, (n,c,3,5), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    mean, std = channel_stats(x)
    f = x.double()/255
    torch.testing.assert_close(mean.double(), f.mean((0,2,3)), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(std.double(), f.std((0,2,3), correction=0), rtol=1e-5, atol=1e-6)
    assert channel_stats(torch.full_like(x, 9))[1].min() >= 1/256


def test_only_matching_images_and_labels_make_a_data_set():
    x, y = torch.zeros(20, 1, 8, 8, dtype=torch.uint8), torch.arange(20) % 10
    assert len(ImageData.create('digits', (x,y), (x,y), 'made up').x_test) == 20
    for bad, says in (((x[1:],y), '19 test images but 20 labels'), ((x[:9],y[:9]), 'no test image of 9'),
        ((x,y+1), 'label 10 is out of range'), ((x,torch.where(y > 8, 10*(y//9), y)), 'label 10 is out of range'),
        ((x,y-1), 'label -1 is out of range'),
        ((torch.cat([x,x]),torch.arange(40) % 20), 'label 10 is out of range')):
        with pytest.raises(ValueError, match=says): ImageData.create('digits', (x,y), bad, 'made up')

# --- image-folder trees

@pytest.mark.parametrize('sub', ['', 'cifar10'])
def test_png_tree(tmp_path, sub):
    made = make_tree(tmp_path/sub, 'cifar10')
    d = load_dataset('cifar10', tmp_path)
    assert d.classes == 'airplane automobile bird cat deer dog frog horse ship truck'.split()
    for x, y, split in ((d.x_train, d.y_train, 'train'), (d.x_test, d.y_test, 'test')):
        want = [(i, a) for i, c in enumerate(d.classes) for a in made[split][c]]
        assert y.tolist() == [i for i, _ in want]
        assert (x.permute(0,2,3,1).numpy() == np.stack([a for _, a in want])).all()
    assert 'PNG' in d.source and 'JPEG' not in d.source and str(tmp_path) not in d.source
    assert d.coarse.tolist() == [1,1,0,0,0,0,0,0,1,1]

@pytest.mark.parametrize('ext', ['jpg', 'JPEG'])
def test_jpeg_tree_says_so(tmp_path, ext):
    made = make_tree(tmp_path, 'cifar10', ext, train=2, test=1)
    d = load_dataset('cifar10', tmp_path)
    assert 'JPEG re-encoded' in d.source
    diff = d.x_train[0].permute(1,2,0).float() - torch.from_numpy(made['train']['airplane'][0]).float()
    assert diff.abs().mean() < 20

def test_nested_cifar100_tree(tmp_path):
    make_tree(tmp_path/'cifar100', 'cifar100', train=2, test=1, nested=True)
    d = load_dataset('cifar100', tmp_path)
    assert len(d.x_train) == 200 and d.y_train.unique().tolist() == list(range(100))
    assert d.coarse_names[d.coarse[d.classes.index('lion')]] == 'large_carnivores'
    assert not available(tmp_path).found['cifar10']

def test_folder_names_are_read_leniently(tmp_path):
    for split in ('train', 'test'):
        for c in DATASETS['fashion_mnist'].classes:
            d = tmp_path/'fashion-mnist'/split/c.upper().replace('/', ' ')
            d.mkdir(parents=True)
            Image.fromarray(scan(len(c), 28)[:,:,0]).save(d/'a.png')
            (d/'notes.txt').write_text('not an image')
            (d/'._a.png').write_text('what macOS leaves behind')
        (tmp_path/'fashion-mnist'/split/'.ipynb_checkpoints').mkdir()
    d = load_dataset('fashion_mnist', tmp_path)
    assert d.x_train.shape == (10,1,28,28) and d.classes[9] == 'Ankle boot'

def test_decoded_once_and_never_stale(tmp_path, monkeypatch):
    make_tree(tmp_path, 'cifar10', train=2, test=1)
    opened, real = [], Image.open
    monkeypatch.setattr(Image, 'open', lambda f, *a: opened.append(f) or real(f, *a))
    a = load_dataset('cifar10', tmp_path)
    first = len(opened)
    b = load_dataset('cifar10', tmp_path)
    assert first > 30 and len(opened) - first <= 1 and torch.equal(a.x_train, b.x_train)
    f = tmp_path/'train'/'bird'/'0.png'
    before = f.stat()
    Image.fromarray(255 - scan(0)).save(f, compress_level=0)
    os.utime(f, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert f.stat().st_size == before.st_size
    c = load_dataset('cifar10', tmp_path)
    assert (c.x_train != a.x_train).flatten(1).any(1).nonzero().flatten().tolist() == [4]
    (tmp_path/'train'/'bird'/'1.png').rename(tmp_path/'train'/'bird'/'-1.png')
    assert (load_dataset('cifar10', tmp_path).x_train != c.x_train).any()

def test_trees_that_look_alike_are_told_apart(tmp_path):
    for i in range(2):
        for split in ('train', 'test'):
            for c in DATASETS['cifar10'].classes:
                f = tmp_path/str(i)/split/c/'0.png'
                f.parent.mkdir(parents=True)
                Image.fromarray(scan(i)).save(f, compress_level=0)
                os.utime(f, (0, 0))
    a, b = (load_dataset('cifar10', tmp_path/str(i)) for i in range(2))
    assert not torch.equal(a.x_train, b.x_train)

def test_unwritable_cache_is_no_obstacle(tmp_path, monkeypatch):
    make_tree(tmp_path/'d', 'cifar10', train=1, test=1)
    (tmp_path/'file').write_text('')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'file'))
    assert len(load_dataset('cifar10', tmp_path/'d').x_train) == 10

def test_several_processes_load_at_once(tmp_path):
    make_tree(tmp_path, 'cifar10')
    ctx = multiprocessing.get_context('fork')
    start, out = ctx.Barrier(4), ctx.Queue()
    def child():
        start.wait(30)
        out.put([x.numpy().tobytes() for x, _ in readers.find_tree('cifar10', tmp_path).load()])
    ps = [ctx.Process(target=child) for _ in range(4)]
    for p in ps: p.start()
    got = [out.get(timeout=30) for _ in ps]
    for p in ps: p.join()
    d = load_dataset('cifar10', tmp_path)
    assert got == [[d.x_train.numpy().tobytes(), d.x_test.numpy().tobytes()]]*4

@pytest.mark.parametrize('harm, says', [
    (lambda d: [f.unlink() for f in (d/'train'/'bird').iterdir()] and (d/'train'/'bird').rmdir(), 'missing: bird'),
    (lambda d: (d/'train'/'unicorn').mkdir(), 'unknown: unicorn'),
    (lambda d: (d/'test').rename(d/'validation'), 'no class folders'),
    (lambda d: [f.unlink() for f in (d/'test'/'frog').iterdir()], 'no test image of frog'),
    (lambda d: Image.fromarray(scan(0, 31)).save(d/'train'/'cat'/'1.png'), 'mixed size'),
    (lambda d: (d/'train'/'cat'/'1.png').write_bytes(b'\x89PNG junk'), '1 of 20 files.*1.png is not a readable image'),
    (lambda d: (d/'train'/'cat'/'1.png').write_bytes((d/'train'/'cat'/'1.png').read_bytes()[:-60]), 'not a readable image'),
    (lambda d: [f.unlink() for f in d.glob('test/*/*')], 'no .png or .jpg files')])
def test_damaged_trees_are_refused(tmp_path, harm, says):
    make_tree(tmp_path/'cifar10', 'cifar10', train=2, test=1)
    harm(tmp_path/'cifar10')
    with pytest.raises(ValueError, match=says): load_dataset('cifar10', tmp_path)

def test_wrong_classes_in_a_folder_of_the_right_name_are_refused(tmp_path):
    make_tree(tmp_path/'cifar10', 'digits', train=1, test=1)
    with pytest.raises(ValueError, match='missing: airplane.*unknown: 0, 1'): load_dataset('cifar10', tmp_path)

def test_splits_of_different_size_are_refused(tmp_path):
    make_tree(tmp_path/'a', 'cifar10', train=1, test=1)
    make_tree(tmp_path/'b', 'cifar10', train=1, test=1, size=16)
    (tmp_path/'a'/'test').rename(tmp_path/'a'/'old')
    (tmp_path/'b'/'test').rename(tmp_path/'a'/'test')
    with pytest.raises(ValueError, match=r'32, 32.*16, 16'): load_dataset('cifar10', tmp_path/'a')

def test_one_trees_folder_is_not_anothers(tmp_path):
    make_tree(tmp_path, 'cifar10', train=1, test=1)
    with pytest.raises(FileNotFoundError): load_dataset('cifar100', tmp_path)


# --- idx files and pickles

def write_idx(path, a):
    a = np.ascontiguousarray(a, dtype='uint8')
    with (gzip.open if path.suffix == '.gz' else open)(path, 'wb') as f:
        f.write(struct.pack('>HBB', 0, 8, a.ndim) + struct.pack(f'>{a.ndim}I', *a.shape) + a.tobytes())

def make_idx(folder, ext='.gz', n=30, m=20, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for part, k in (('train', n), ('t10k', m)):
        write_idx(folder/f'{part}-images-idx3-ubyte{ext}', rng.integers(0, 256, (k,28,28)))
        write_idx(folder/f'{part}-labels-idx1-ubyte{ext}', np.arange(k) % 10)

def test_read_idx_against_torchvision(tmp_path):
    make_idx(tmp_path, '')
    make_idx(tmp_path, '.gz')
    from torchvision.datasets.mnist import read_image_file, read_label_file
    want = read_image_file(str(tmp_path/'train-images-idx3-ubyte'))
    for ext in ('', '.gz'):
        assert torch.equal(read_idx(tmp_path/f'train-images-idx3-ubyte{ext}'), want)
        assert readers.idx_length(tmp_path/f'train-images-idx3-ubyte{ext}') == len(want)
        labels = read_idx(tmp_path/f't10k-labels-idx1-ubyte{ext}')
        assert torch.equal(labels.long(), read_label_file(str(tmp_path/'t10k-labels-idx1-ubyte')))

@pytest.mark.parametrize('sub, ext', [('', '.gz'), ('fashion-mnist', '.gz'), ('fashion_mnist', ''), ('FashionMNIST/raw', '')])
def test_idx_layouts(tmp_path, sub, ext):
    make_idx(tmp_path/sub, ext)
    d = load_dataset('fashion_mnist', tmp_path)
    assert d.x_train.shape == (30,1,28,28) and d.x_test.shape == (20,1,28,28) and d.y_test.tolist() == list(range(10))*2
    assert torch.equal(d.x_train[:,0], read_idx(tmp_path/sub/f'train-images-idx3-ubyte{ext}'))
    assert d.source.startswith('idx files') and str(tmp_path) not in d.source
    assert d.classes == torchvision.datasets.FashionMNIST.classes
    assert [d.coarse_names[i] for i in d.coarse[[0, 1, 9]]] == ['tops', 'other', 'footwear']

def test_torchvisions_layout_is_what_torchvision_reads(tmp_path):
    make_idx(tmp_path/'FashionMNIST/raw', '')
    d, tv = load_dataset('fashion_mnist', tmp_path), torchvision.datasets.FashionMNIST(tmp_path, train=False)
    assert torch.equal(d.x_test[:,0], tv.data) and torch.equal(d.y_test, tv.targets)

@pytest.mark.parametrize('harm, says', [
    (lambda f: f.write_bytes(f.read_bytes()[:200]), 'no idx file|cut short'),
    (lambda f: f.write_bytes(b'no gzip'), 'no idx file'),
    (lambda f: f.write_bytes(b'\x1f\x8b\x08' + bytes(7) + b'\xff'*300), 'no idx file: Error -3'),
    (lambda f: write_idx(f, np.zeros((29,28,28))), '29 images but 30 labels'),
    (lambda f: f.write_bytes(gzip.compress(struct.pack('>HBB3I', 0, 8, 3, 30, 28, 28) + bytes(100))), 'cut short'),
    (lambda f: f.write_bytes(gzip.compress(struct.pack('>HBB3I', 0, 13, 3, 1, 1, 1) + bytes(4))), 'unsigned bytes'),
    (lambda f: f.unlink(), 'incomplete: train-images-idx3-ubyte')])
def test_damaged_idx_is_refused(tmp_path, harm, says):
    make_idx(tmp_path)
    harm(tmp_path/'train-images-idx3-ubyte.gz')
    with pytest.raises(ValueError, match=says): load_dataset('fashion_mnist', tmp_path)
    if 'cut' not in says: assert says in available(tmp_path).source['fashion_mnist']

def make_pickles(root, name, n=20):
    "CIFAR as torchvision keeps it; returns the training images (N,3,32,32)"
    spec, rng, xs = DATASETS[name], np.random.default_rng(0), []
    reader = getattr(torchvision.datasets, spec.torchvision)
    (root/spec.torchvision_dir).mkdir(parents=True)
    c = len(spec.classes)
    for f, _ in reader.train_list + reader.test_list:
        x = rng.integers(0, 256, (max(n, c), 3072), dtype='uint8')
        labels = [(i*3) % c for i in range(len(x))]
        key = 'labels' if name == 'cifar10' else 'fine_labels'
        (root/spec.torchvision_dir/f).write_bytes(pickle.dumps({'data': x, key: labels}))
        if f not in ('test', 'test_batch'): xs.append(x)
    meta = {reader.meta['key']: spec.classes}
    (root/spec.torchvision_dir/reader.meta['filename']).write_bytes(pickle.dumps(meta))
    return np.concatenate(xs).reshape(-1, 3, 32, 32)

@pytest.mark.parametrize('name', ['cifar10', 'cifar100'])
def test_pickles(tmp_path, monkeypatch, name):
    monkeypatch.setattr(torchvision.datasets.cifar, 'check_integrity', lambda *a: True)
    x = make_pickles(tmp_path, name)
    d = load_dataset(name, tmp_path)
    assert (d.x_train.numpy() == x).all() and d.source == f"torchvision {name.upper()}"
    assert d.y_train[:4].tolist() == [0, 3, 6, 9]
    assert torchvision.datasets.__dict__[name.upper()](tmp_path).classes == d.classes
    assert (torchvision.datasets.__dict__[name.upper()](tmp_path).data == x.transpose(0,2,3,1)).all()

def test_damaged_pickles_are_refused(tmp_path):
    make_pickles(tmp_path, 'cifar10')
    with pytest.raises(ValueError, match='corrupt'): load_dataset('cifar10', tmp_path)
    (tmp_path/'cifar-10-batches-py'/'data_batch_3').unlink()
    with pytest.raises(ValueError, match='incomplete: data_batch_3'): load_dataset('cifar10', tmp_path)


# --- the search

def test_order_of_search(tmp_path, monkeypatch, isolated):
    "Each place is used when those before it have nothing"
    places = [tmp_path/'root', tmp_path/'env', Path(readers.SYSTEM_FOLDER), isolated/'torch'/'datasets']
    for i, p in enumerate(places): make_idx(p/'fashion-mnist', n=30 + 10*i)
    monkeypatch.setenv('PHANTOM_NB_DATA', str(tmp_path/'env'))
    for i, p in enumerate(places):
        assert len(load_dataset('fashion_mnist', tmp_path/'root').x_train) == 30 + 10*i
        row = available(tmp_path/'root').loc['fashion_mnist']
        assert (row.train, row.path) == (30 + 10*i, p/'fashion-mnist')
        for f in (p/'fashion-mnist').iterdir(): f.unlink()
    with pytest.raises(FileNotFoundError): load_dataset('fashion_mnist', tmp_path/'root')

def test_system_files_are_named_in_full(): # the one path that is the same on every machine
    make_idx(Path(readers.SYSTEM_FOLDER)/'fashion-mnist')
    assert load_dataset('fashion_mnist').source == f"idx files under {readers.SYSTEM_FOLDER}/fashion-mnist"

def test_missing_says_where_and_how(tmp_path, monkeypatch, isolated):
    monkeypatch.setenv('PHANTOM_NB_DATA', str(tmp_path/'env'))
    with pytest.raises(FileNotFoundError) as e: load_dataset('fashion_mnist', tmp_path)
    for s in (tmp_path, tmp_path/'env', readers.SYSTEM_FOLDER, isolated/'torch'/'datasets', 'no such folder', 'fashion-mnist',
        'phantom_nb data fashion_mnist --download', '--root', '$PHANTOM_NB_DATA', 'dataset-fashion-mnist'):
        assert str(s) in str(e.value)
    with pytest.raises(FileNotFoundError) as e: load_dataset('cifar10')
    assert 'cifar-10-batches-py' in str(e.value) and 'dataset-fashion' not in str(e.value)

def test_wrong_root_and_wrong_name(tmp_path):
    for f in (load_dataset, get_dls):
        with pytest.raises(FileNotFoundError, match='nowhere'): f('cifar10', root=tmp_path/'nowhere')
        with pytest.raises(ValueError, match="did you mean 'cifar100'.*digits, fashion_mnist, cifar10, cifar100, or a folder"): f('CIFAR-100')
        with pytest.raises(ValueError, match='give one of digits'): f('imagenet')
    with pytest.raises(ValueError, match='give one of digits'): get_dls(3)
    with pytest.raises(FileNotFoundError): available(tmp_path/'nowhere')

def test_available_decodes_nothing(tmp_path, monkeypatch):
    make_tree(tmp_path/'cifar10', 'cifar10', train=3, test=2)
    make_idx(tmp_path/'fashion-mnist')
    monkeypatch.setattr(Image.Image, 'load', lambda *a: pytest.fail('decoded an image'))
    t = available(tmp_path)
    assert list(t.index) == list(DATASETS) and t.found.tolist() == [True, True, True, False]
    assert t.train.tolist() == [1000, 30, 30, 0] and t.test.tolist() == [797, 20, 20, 0]
    assert t['shape'].tolist() == [(1,8,8), (1,28,28), (3,32,32), (3,32,32)] and t.classes.tolist() == [10, 10, 10, 100]
    assert 'not found' in t.source['cifar100']

def test_download_is_all_or_nothing(tmp_path, monkeypatch, isolated):
    class Fake(torchvision.datasets.CIFAR10):
        broken = True
        def download(self):
            if Path(self.root, self.base_folder).exists(): return
            make_pickles(Path(self.root), 'cifar10')
            if self.broken: raise OSError('the line is dead')
    monkeypatch.setattr(torchvision.datasets, 'CIFAR10', Fake)
    monkeypatch.setattr(torchvision.datasets.cifar, 'check_integrity', lambda *a: True)
    with pytest.raises(ConnectionError, match='(?s)the line is dead.*Try again where'): load_dataset('cifar10', download=True)
    assert list((isolated/'torch'/'datasets').iterdir()) == []
    Fake.broken = False
    for root, place in ((None, isolated/'torch'/'datasets'), (tmp_path/'new', tmp_path/'new')):
        assert len(load_dataset('cifar10', root, download=True).x_train) == 100
        assert [o.name for o in place.iterdir()] == ['cifar-10-batches-py']
        (place/'cifar-10-batches-py').rename(tmp_path/f'gone{root is None}')
    assert len(load_dataset(download=True).x_train) == 1000


# --- subsets and splits

labels = st.lists(st.integers(0, 4), min_size=5, max_size=60).filter(lambda y: len(set(y)) > 1).map(torch.tensor)

@settings(max_examples=60, deadline=None)
@given(labels, st.integers(0, 2**32), st.data())
def test_balanced_subset(y, seed, data):
    cnt = y.bincount()[y.bincount() > 0]
    low, high = len(cnt), int(len(cnt)*cnt.min() + (cnt > cnt.min()).sum())
    n = data.draw(st.integers(low, high))
    idx = balanced_subset(y, n, seed)
    got = torch.stack([(y[idx] == c).sum() for c in y.unique()])
    assert idx.dtype == torch.int64 and len(idx.unique()) == n and got.max() - got.min() <= 1
    assert torch.equal(balanced_subset(y, n, seed), idx)
    assert torch.equal(balanced_subset(y, high, seed)[:n], idx)
    for bad in (low-1, high+1):
        with pytest.raises(ValueError, match=rf'\[{low}, {high}\]'): balanced_subset(y, bad, seed)

def test_recorded_results_keep_their_subsets(digits):
    "A change of these numbers changes what every recorded run was trained on"
    assert balanced_subset(digits.y_train, 10, 0).tolist() == [206, 584, 81, 518, 459, 162, 674, 945, 582, 222]
    assert get_dls(digits, 50).train.get_idxs()[:8].tolist() == [26, 4, 23, 18, 33, 41, 0, 21]

def test_balanced_subset_is_random_and_keeps_to_itself(digits):
    torch.manual_seed(1)
    np.random.seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    a = balanced_subset(digits.y_train, 500, 1)
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()
    torch.manual_seed(5)
    np.random.seed(5)
    assert torch.equal(balanced_subset(digits.y_train, 500, 1), a)
    assert not torch.equal(balanced_subset(digits.y_train, 500, 2).sort()[0], a.sort()[0])
    overlap = len(set(a.tolist()) & set(balanced_subset(digits.y_train, 500, 2).tolist()))
    assert 200 < overlap < 300
    with pytest.raises(ValueError): balanced_subset(digits.y_train, 20.5)

@settings(max_examples=60, deadline=None)
@given(labels, st.integers(0, 99), st.data())
def test_splits(y, seed, data):
    y = y.unique(return_inverse=True)[1]
    cnt = y.bincount()
    c, full = len(cnt), int(len(cnt)*cnt.min())
    n_valid = data.draw(st.integers(c, full-c)) if full >= 2*c else 0
    n_train = data.draw(st.integers(c, full-n_valid))
    tr, va = split_pool(y, n_train, n_valid, seed)
    rest, va2 = split_pool(y, None, n_valid, seed)
    assert len(tr) == n_train and len(va) == n_valid and torch.equal(va, va2)
    assert not set(tr.tolist()) & set(va.tolist())
    assert sorted(rest.tolist() + va.tolist()) == list(range(len(y)))
    assert torch.equal(tr, balanced_subset(y, n_train, seed))
    if n_valid:
        got = y[va].bincount(minlength=c)
        assert got.max() - got.min() <= 1
    with pytest.raises(ValueError, match=rf'n_train={full-n_valid+1}: .* {full-n_valid}\]'): split_pool(y, full-n_valid+1, n_valid, seed)
    if full<2*c:
        with pytest.raises(ValueError, match='a class has one image'): split_pool(y, None, c, seed)

@pytest.mark.parametrize('n_train, n_valid, want', [(None, None, (900,100)), (200, None, (200,100)), (950, None, (950,50)),
    (1000, None, (1000,0)), (None, 0, (1000,0)), (995, None, (995,0)), (10, 990, (10,990)), (None, 500, (500,500))])
def test_default_sizes(digits, n_train, n_valid, want):
    dls = get_dls(digits, n_train, n_valid)
    assert (len(dls.train_ds), len(dls.valid_ds), len(dls.test_ds)) == (*want, 797)

def test_split_sizes_are_checked(digits):
    for kw in (dict(n_train=5), dict(n_train=1001), dict(n_valid=5), dict(n_valid=991), dict(n_train=910, n_valid=100),
        dict(bs=0), dict(augment='x'), dict(seed=-1)):
        with pytest.raises(ValueError): get_dls(digits, **kw)

def test_test_images_are_never_trained_or_tuned_on():
    data = tagged()
    dls = get_dls(data, seed=3)
    tr, va, te = (seen(o) for o in dls)
    assert te == list(range(10_000, 10_060))
    assert sorted(tr + va) == list(range(200)) and len(va) == 20
    torch.testing.assert_close(data.mean[0], data.x_train.float().mean()/255)
    assert (dls.test_ds.info.mean == data.mean).all()

def test_seeds_of_split_and_order(digits):
    a, b, c = get_dls(digits, 100, seed=1), get_dls(digits, 100, seed=2, split_seed=1), get_dls(digits, 100, seed=2)
    assert torch.equal(a.train_ds.x, b.train_ds.x) and torch.equal(a.valid_ds.x, b.valid_ds.x)
    assert not same(a.one_batch(), b.one_batch())
    assert not torch.equal(a.train_ds.x, c.train_ds.x) and not torch.equal(a.valid_ds.x, c.valid_ds.x)


# --- batches

def test_batches_are_plain_normalised_floats_from_bytes(digits):
    dls = get_dls(digits, 100, bs=30)
    assert all(o.dataset.x.dtype == torch.uint8 for o in dls)
    for dl, x, y in ((dls.test, digits.x_test, digits.y_test), (dls.valid, dls.valid_ds.x, dls.valid_ds.y)):
        xs, ys = zip(*dl)
        assert type(xs[0]) is torch.Tensor and xs[0].dtype == torch.float32 and ys[0].dtype == torch.int64
        torch.testing.assert_close(torch.cat(xs), (x.float()/255 - digits.mean)/digits.std, rtol=1e-5, atol=1e-5)
        assert torch.equal(torch.cat(ys), y)
    assert type(next(iter(dls.train))) is tuple

@settings(max_examples=80, deadline=None)
@given(st.integers(0, 40), st.integers(1, 12), st.booleans(), st.booleans())
def test_every_image_once_and_no_batch_of_one(n, bs, shuffle, drop_last):
    data = tagged(40)
    dl = ImageDL(ImageSet(data.x_train[:n], data.y_train[:n], data), bs, shuffle, drop_last=drop_last)
    sizes = [len(y) for _, y in dl]
    assert len(dl) == len(sizes)
    if drop_last: assert sizes == [bs]*(n//bs)
    else:
        assert sorted(seen(dl)) == list(range(n)) and sum(sizes) == n
        assert min(sizes, default=2) > 1 or bs == 1 or n == 1
        assert max(sizes, default=0) <= bs + (bs > 1)

def test_order_depends_on_seed_and_epoch_alone():
    data = tagged()
    def order(seed=0, epoch=0, bs=16): return seen(ImageDL(ImageSet(data.x_train, data.y_train, data), bs, True, seed=seed, epoch=epoch))
    a = order()
    torch.manual_seed(9)
    np.random.seed(9)
    random.seed(9)
    assert order() == a == order(bs=50)
    assert len({tuple(o) for o in (a, order(1), order(0, 1), order(1, 1), order(2))}) == 5
    dl = ImageDL(ImageSet(data.x_train, data.y_train, data), 16, True, augment=Augment(1))
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    for _ in dl: pass
    assert torch.equal(torch.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()

def test_resumed_run_sees_the_same_batches(digits):
    def loaders(): return get_dls(digits, 150, bs=40, augment=True, seed=7)
    whole, rest = loaders(), loaders()
    passes = [list(whole.train) for _ in range(4)]
    assert whole.train.epoch == 4 and not same(passes[0][0], passes[1][0])
    rest.train.epoch = 2
    for want in passes[2:]:
        for a, b in zip(rest.train, want, strict=True): assert same(a, b)

def test_only_complete_passes_count(digits):
    dls = get_dls(digits, 200, bs=50)
    want = dls.one_batch()
    dls.show_batch()
    next(iter(dls.train))
    for i, _ in enumerate(dls.train):
        if i == 2: break
    assert dls.train.epoch == 0 and same(dls.one_batch(), want)
    learn = learner(dls)
    with learn.no_logging(): learn.fit(2)
    assert dls.train.epoch == 2
    assert dls.train.new().epoch == 2 and same(dls.train.new().one_batch(), dls.one_batch())

@pytest.mark.parametrize('pad, flip, shape', [(0, True, (1,5,7)), (1, False, (1,8,8)), (3, True, (1,28,28)), (4, True, (3,32,32))])
def test_augment_equals_a_loop(pad, flip, shape):
    g = torch.Generator().manual_seed(0)
    x, aug = torch.randint(0, 256, (40,*shape), dtype=torch.uint8, generator=g), Augment(pad, flip)
    d = aug.draw(40, np.random.default_rng(1))
    for im, (dy, dx, mirrored), got in zip(x, d, aug(x, d)):
        padded = F.pad(im, (pad,)*4)
        want = padded[:, dy:dy+shape[1], dx:dx+shape[2]]
        assert torch.equal(got, want.flip(-1) if mirrored else want)
    assert torch.equal(aug(x.float(), d), aug(x, d).float())

def test_draws_are_uniform():
    d = Augment(2).draw(20_000, np.random.default_rng(0))
    cells = torch.bincount(d[:,0]*10 + d[:,1]*2 + d[:,2], minlength=50)
    assert len(cells) == 50 and ((cells - 400.)**2/400).sum() < 85  # chi-squared, 49 degrees of freedom: p = 0.001
    assert set(Augment(0, False).draw(100, np.random.default_rng(0)).flatten().tolist()) == {0}

def find(im, x, pad, flip):
    "All (dy, dx, mirrored) that make `im` out of `x`"
    h, w = x.shape[-2:]
    p = F.pad(x, (pad,)*4)
    wins = {(dy, dx): p[:, dy:dy+h, dx:dx+w] for dy in range(2*pad+1) for dx in range(2*pad+1)}
    return [(*k, m) for k, v in wins.items() for m in range(1+flip) if torch.equal(v.flip(-1) if m else v, im)]

def test_loader_augments_each_image_by_seed_epoch_and_number():
    "Every offset occurs, about half are mirrored, and neither batch size nor company matters"
    g = torch.Generator().manual_seed(0)
    x, y = torch.randint(1, 256, (300,1,9,9), dtype=torch.uint8, generator=g), torch.arange(300) % 10
    data = ImageData.create('digits', (x,y), (x,y), 'noise')
    def one_pass(bs, epoch=0):
        dl = ImageDL(ImageSet(x, torch.arange(300), data), bs, True, augment=Augment(1), epoch=epoch)
        xs, ns = map(torch.cat, zip(*dl))
        return raw(dl, xs)[ns.argsort()]
    a = one_pass(64)
    hits = [find(im, o, 1, True) for im, o in zip(a, x)]
    assert all(len(h) == 1 for h in hits)
    assert len({h[0] for h in hits}) == 18 and 120 < sum(h[0][2] for h in hits) < 180
    assert torch.equal(one_pass(7), a) and not torch.equal(one_pass(64, 1), a)
    want = Augment(1).draw(300, np.random.default_rng([0, 0, 2]))  # drawn on the CPU, whatever the device
    assert [h[0] for h in hits] == [tuple(o) for o in want.tolist()]

def test_recipes(digits):
    aug = get_dls(digits, augment=True).train.augment
    assert aug == Augment(1, False)
    for name, side, pad in (('fashion_mnist', 28, 3), ('cifar10', 32, 4)):
        x, y = torch.zeros(20, DATASETS[name].shape[0], side, side, dtype=torch.uint8), torch.arange(20) % 10
        dls = get_dls(ImageData.create(name, (x,y), (x,y), 'blank'), augment=True)
        assert dls.train.augment == Augment(pad, True) and dls.valid.augment is None and dls.test.augment is None
    assert get_dls(digits).train.augment is None
    assert get_dls(digits, augment=Augment(2, True)).train.augment == Augment(2, True)

def test_only_shuffled_training_passes_are_augmented():
    data = tagged()
    dls = get_dls(data, 100, augment=Augment(2, True))
    plain = dls.train.new(shuffle=False)
    assert torch.equal(torch.cat([raw(plain, x) for x, _ in plain]), dls.train_ds.x)
    assert torch.equal(torch.cat([raw(dls.test, x) for x, _ in dls.test]), data.x_test)
    assert not torch.equal(torch.cat([raw(dls.train, x) for x, _ in dls.train]).sort(0)[0], dls.train_ds.x.sort(0)[0])

def test_channels_last():
    x, y = torch.randint(0, 256, (20,3,8,8), dtype=torch.uint8), torch.arange(20) % 10
    data = ImageData.create('cifar10', (x,y), (x,y), 'noise')
    for augment in (False, True):
        a, b = (get_dls(data, augment=augment, channels_last=o).one_batch() for o in (False, True))
        assert same(a, b) and a[0].is_contiguous() and b[0].is_contiguous(memory_format=torch.channels_last)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_gpu_batches_equal_cpu_batches(digits):
    a, b = (get_dls(digits, 100, augment=True, device=o) for o in ('cpu', 'cuda'))
    assert b.train_ds.x.is_cuda and b.train_ds.x.dtype == torch.uint8
    for _ in range(2):
        for (x, y), (x1, y1) in zip(a.train, b.train, strict=True):
            assert x1.is_cuda and torch.equal(y, y1.cpu())
            torch.testing.assert_close(x, x1.cpu())

def test_batches_are_the_callers(digits):
    "CutMix writes into the batch: that must not reach the data"
    dls = get_dls(digits, 50)
    x, y = dls.one_batch()
    x.zero_()
    y.zero_()
    assert dls.one_batch()[0].abs().sum() > 0 and torch.equal(dls.train_ds.y.bincount(), torch.full((10,), 5))


# --- loaders in fastai

def test_names_on_the_loaders(digits, tmp_path):
    dls = get_dls(digits, 50, path=tmp_path, bs=20, val_bs=33)
    assert isinstance(dls, ImageLoaders) and dls.test is dls[2] and dls.c == 10 and dls.n_inp == 1
    assert list(dls.vocab) == digits.classes and dls.path == tmp_path and dls.source == digits.source
    assert torch.equal(dls.coarse, digits.coarse) and dls.device == dls.train.device
    assert (dls.train.bs, dls.valid.bs, dls.test.bs) == (20, 33, 33) and get_dls(digits, bs=20).test.bs == 40
    assert type(learner(dls).loss_func).__name__ == 'CrossEntropyLossFlat'

def test_new_keeps_what_it_is_not_told_to_change(digits):
    x, y = torch.randint(0, 256, (40,3,8,8), dtype=torch.uint8), torch.arange(40) % 10
    data = ImageData.create('cifar10', (x,y), (x,y), 'noise')
    dl = ImageDL(ImageSet(x, y, data), 16, True, seed=5, augment=Augment(2), channels_last=True, epoch=3, num_workers=4)
    for a, b in zip(dl, dl.new(epoch=3), strict=True): assert same(a, b) and a[0].stride() == b[0].stride()
    assert dl.new().epoch == 4 and dl.new(shuffle=False, bs=8).bs == 8
    assert dl.fake_l.num_workers == dl.new().fake_l.num_workers == 0

def test_moving_a_loader_leaves_others_alone(digits):
    dls = get_dls(digits, 50, device='cpu')
    other = dls.train.new(device='meta')
    assert other.dataset.x.device.type == 'meta' and dls.train_ds.x.device.type == 'cpu'
    assert dls.device == torch.device('cpu') == other.new(device='cpu', dataset=dls.train_ds).device

def test_coarse_labels(digits):
    fine, dls = get_dls(digits, 100), get_dls(digits, 100, coarse=True)
    for a, b in zip(fine, dls):
        assert torch.equal(a.dataset.x, b.dataset.x) and torch.equal(b.dataset.fine, a.dataset.y.cpu())
        assert torch.equal(b.dataset.y.cpu(), digits.coarse[b.dataset.fine])
        assert torch.equal(b.new(device='meta').dataset.fine, b.dataset.fine)
    assert dls.c == 2 and list(dls.vocab) == ['even', 'odd'] and torch.equal(dls.coarse, digits.coarse)
    assert dls.test.decode_batch(dls.test.one_batch())[0][1] in ('even', 'odd')
    learn = learner(dls)
    with learn.no_logging(): learn.fit(1)

def test_fit_validate_and_predictions_in_order(digits):
    torch.manual_seed(0)
    dls = get_dls(digits, 300, augment=True, bs=32)
    learn = learner(dls)
    with learn.no_logging(): learn.fit(8, 1e-2)
    preds, targs = learn.get_preds(dl=dls.test)
    assert torch.equal(targs, digits.y_test)
    x = (digits.x_test.float()/255 - digits.mean)/digits.std
    with torch.no_grad(): torch.testing.assert_close(preds, learn.model(x.to(dls.device)).cpu().softmax(1), rtol=1e-3, atol=1e-4)
    acc = (preds.argmax(1) == targs).float().mean()
    assert acc > 0.7 and learn.validate(dl=dls.test)[1] == pytest.approx(float(acc))
    assert list(learn.validate(ds_idx=2)) == pytest.approx(list(learn.validate(dl=dls.test)))
    plain, y = learn.get_preds(ds_idx=0)
    assert torch.equal(y, dls.train_ds.y.cpu())
    with torch.no_grad(): want = learn.model((dls.train_ds.x - dls.train_ds.shift)/dls.train_ds.scale).cpu().softmax(1)
    torch.testing.assert_close(plain, want, rtol=1e-3, atol=1e-4)
    assert torch.equal(learn.get_preds(dl=dls.train)[1], dls.train_ds.y.cpu())

@pytest.mark.parametrize('cb', [MixUp, CutMix])
def test_mixing_callbacks(digits, cb):
    learn = learner(get_dls(digits, 65, bs=64), cbs=cb())
    with learn.no_logging(): learn.fit(2)
    assert np.isfinite(learn.recorder.values[-1][0])

def test_lr_find_then_start_again(digits, tmp_path):
    dls = get_dls(digits, 100, bs=20, path=tmp_path)
    learn = learner(dls)
    want = dls.one_batch()
    with learn.no_logging(): assert learn.lr_find(num_it=12, show_plot=False).valley > 0
    dls.train.epoch = 0
    assert same(dls.one_batch(), want)

def test_no_validation_images(digits):
    dls = get_dls(digits, n_valid=0)
    assert len(dls.valid) == 0 and list(dls.valid) == []
    learn = learner(dls)
    with learn.no_logging(): learn.fit(1)
    assert learn.recorder.values[0][0] > 0 and learn.recorder.values[0][1] is None
    assert learn.predict(digits.x_test[0])[0] in dls.vocab

def test_pictures(digits):
    import matplotlib.pyplot as plt
    plt.style.use('default') # a command that ran in this process has its own
    dls = get_dls(digits, 100, augment=Augment(2, True))
    learn = learner(dls)
    dls.show_batch(max_n=4)
    shown = [a.get_title() for a in plt.gcf().axes if a.get_title()]
    assert shown == [dls.vocab[i] for i in dls.one_batch()[1][:4]]
    assert plt.gcf().axes[0].images[0].get_cmap().name == 'Greys'
    decoded = dls.train.decode((10*dls.one_batch()[0], dls.one_batch()[1]))
    assert decoded[0].min() >= 0 and decoded[0].max() <= 1 and decoded[0].device.type == 'cpu'
    im = plt.gcf().axes[0].images[0].get_array()
    torch.testing.assert_close(torch.as_tensor(np.asarray(im)).float(), raw(dls.train, dls.one_batch()[0])[0,0].cpu()/255)
    dls.show_batch(unique=True, max_n=6)
    axes = plt.gcf().axes
    assert len({a.get_title() for a in axes}) == 1 and len({np.asarray(a.images[0].get_array()).tobytes() for a in axes}) > 3
    learn.show_results(max_n=4)
    learn.show_results(ds_idx=2, max_n=4)
    interp = ClassificationInterpretation.from_learner(learn, dl=dls.test)
    assert interp.confusion_matrix().sum() == 797 and len(interp.vocab) == 10
    losses, idx = interp.top_losses(3)
    assert torch.equal(interp[idx][2], digits.y_test[idx])
    interp.plot_top_losses(3)
    interp.plot_confusion_matrix()
    plt.close('all')

def test_export_and_predict(digits, tmp_path):
    torch.manual_seed(0)
    dls = get_dls(digits, 900, path=tmp_path, coarse=False)
    learn = learner(dls)
    with learn.no_logging(): learn.fit(5, 1e-2)
    with warnings.catch_warnings(action='ignore'):
        learn.export('m.pkl')
        loaded = load_learner(tmp_path/'m.pkl')
    assert (tmp_path/'m.pkl').stat().st_size < 60_000 + sum(p.numel()*4 for p in learn.model.parameters())
    assert len(loaded.dls.train_ds) == len(loaded.dls.test_ds) == 0 and list(loaded.dls.vocab) == digits.classes
    x = digits.x_test[7]
    Image.fromarray(x[0].numpy()).save(tmp_path/'x.png')
    want = learn.get_preds(dl=dls.test)[0][7]
    for item in (x, TensorImage(x), x[0], x.numpy(), Image.fromarray(x[0].numpy()), tmp_path/'x.png', str(tmp_path/'x.png')):
        label, i, p = loaded.predict(item)
        assert label == digits.classes[i] and i == want.argmax()
        torch.testing.assert_close(p, want, rtol=1e-4, atol=1e-5)
    shown = torch.as_tensor(np.asarray(loaded.predict(x, with_input=True)[0]))
    torch.testing.assert_close(shown, x.float()/255, rtol=1e-4, atol=1e-5)
    for bad in (x.float(), torch.zeros(1, 9, 9, dtype=torch.uint8), torch.zeros(3, 8, 8, dtype=torch.uint8),
        torch.zeros(1, 4, 16, dtype=torch.uint8)):
        with pytest.raises(ValueError, match='uint8 of shape'): loaded.predict(bad)

def test_colour_files_and_arrays_become_the_data_sets_shape(tmp_path):
    x, y = torch.randint(0, 256, (20,3,8,8), dtype=torch.uint8), torch.arange(20) % 10
    dls = get_dls(ImageData.create('cifar10', (x,y), (x,y), 'noise'))
    hwc = x[3].permute(1,2,0).numpy()
    Image.fromarray(hwc).resize((16,16), Image.NEAREST).convert('RGBA').save(tmp_path/'big.png')
    dl = dls.test_dl([hwc, x[3], Image.fromarray(hwc)])
    assert torch.equal(raw(dl, dl.one_batch()[0]), x[[3,3,3]].to(dls.device)) and len(dl.one_batch()) == 1
    assert type(dls.test_dl([TensorImage(x[3])]).one_batch()[0]) is torch.Tensor
    assert dls.test_dl([tmp_path/'big.png']).one_batch()[0].shape == (1,3,8,8)
    labelled = dls.test_dl([(x[0], 4), (x[1], y[1])], with_labels=True).one_batch()
    assert labelled[1].tolist() == [4, 1]

@pytest.mark.parametrize('clone', [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies(digits, clone):
    dls = get_dls(digits, 60, augment=True, bs=25)
    list(dls.train)
    other = clone(dls)
    assert other.train.epoch == 1 and other.train_ds.x.data_ptr() != dls.train_ds.x.data_ptr()
    for a, b in zip(dls.train, other.train, strict=True): assert same(a, b)
    assert list(other.vocab) == list(dls.vocab)

def test_dealt_out_to_processes():
    "What fastai's `DistributedDL` calls: each rank gets a part of the order, and images are augmented as in one process"
    data = tagged(100)
    def loader(): return ImageDL(ImageSet(data.x_train, data.y_train, data), 10, True, augment=Augment(1))
    def part(dl, rank):
        idxs = list(dl.get_idxs())
        dl.randomize()
        dl.before_iter()
        yield from (dl.after_batch(b) for b in dl.create_batches(i for i in [int(o) for o in idxs][rank*50:rank*50+50]))
        dl.after_iter()
    whole, ranks = loader(), [loader(), loader()]
    want = torch.cat([raw(whole, x) for x, _ in whole])
    got = torch.cat([raw(whole, x) for rank, dl in enumerate(ranks) for x, _ in part(dl, rank)])
    assert torch.equal(got, want) and [dl.epoch for dl in ranks] == [1, 1]

@pytest.mark.parametrize('drop_last', [False, True])
def test_batches_made_together_are_those_made_one_by_one(digits, drop_last, monkeypatch):
    def batches(block):
        monkeypatch.setattr(loaders, 'BLOCK', block)
        dl = get_dls(digits, n_train=65, n_valid=0, bs=8, augment=True, device='cpu').train.new(drop_last=drop_last)
        return [(x.clone(), y.clone()) for x,y in dl]
    one,three,all_ = (batches(block) for block in (1, 3*8*64, 10**6))
    assert len(one) == 8 and all(same(a, b) and same(a, c) for a,b,c in zip(one, three, all_))
    assert [len(y) for _,y in one] == [len(y) for _,y in three] == [8]*7 + [8 if drop_last else 9]

def test_wrong_labels_are_those_that_recorded_runs_had():
    assert noisy_labels(torch.arange(20)%4, .5, 4, 3).tolist()==[1,3,0,1,0,1,0,3,0,1,2,1,2,1,0,1,0,1,3,1]

def test_no_class_is_lost_in_a_long_tail():
    y = torch.arange(40)%4
    kept = y[long_tail(y, 1000.)]
    assert kept.bincount().tolist()==[10,1,1,1]

def test_validation_images_of_its_own_are_mixed():
    "As folders lie, class by class, a look at a few batches would see one class"
    data = load_dataset('digits')
    order = data.y_test.argsort(stable=True)
    dls = get_dls(replace(data, x_valid=data.x_test[order], y_valid=data.y_test[order]), n_train=40, bs=10, device='cpu')
    first = next(iter(dls.valid))[1]
    assert len(dls.valid_ds)==len(order) and len(first.unique())>3
    assert torch.cat([y for _,y in dls.valid]).bincount().equal(data.y_test.bincount())
