"Any folder of images: layouts, odd files, sizes, memory; long tails, wrong labels; augmentation by fastai, seeded."
import os, pickle, threading, time, warnings
os.environ.setdefault('MPLBACKEND', 'agg')
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np, pytest, torch
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner, load_learner
from fastai.metrics import accuracy
from fasttransform import Transform
from fastai.vision.augment import Brightness, Flip, RandomErasing, Rotate
from fastai.torch_core import TensorImage, TensorImageBW
import fastai.callback.schedule # chkstyle: ignore
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch import nn

import phantom_nb.data.images as images
from phantom_nb.cli import _same_name
from phantom_nb.experiments.plan import has_test_images
from phantom_nb.experiments.run import Run
from phantom_nb.experiments.runner import name_images
from phantom_nb.data import (Augment, BatchTransforms, ImageDL, ImageSet, find_images, get_dls, load_dataset, long_tail, make_augment,
    noisy_labels, read_image, resized_crop_mat, split_pool)

@pytest.fixture(autouse=True)
def isolated(tmp_path_factory, monkeypatch):
    "No cache is shared with the user"
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('home')/'cache'))

@pytest.fixture(scope='module')
def digits(): return load_dataset()

def picture(seed, w=20, h=16, mode='RGB'):
    "A smooth picture of its own colours"
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (3,3,3), dtype='uint8')
    return Image.fromarray(small).resize((w,h), Image.BILINEAR).convert(mode)

def fill(folder, n, seed=0, ext='png', **kw):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n): picture(1000*seed + i, **kw).save(folder/f'img{i}.{ext}')

def tree(root, counts, **kw):
    "Make root/<key>/img*.png with as many pictures as each key says"
    for i,(place,n) in enumerate(counts.items()): fill(root/place, n, i, **kw)
    return root

def linear(dls): return nn.Sequential(nn.Flatten(), nn.Linear(dls.train_ds.x[0].numel(), dls.c))


# --- layouts

def test_train_and_test(tmp_path):
    d = load_dataset(tree(tmp_path/'pets', {'train/cat': 6, 'train/Dog': 5, 'test/cat': 2, 'test/dog': 3}))
    assert d.name == 'pets' and d.classes == ['cat', 'Dog'] and d.x_train.shape == (11,3,128,128)
    assert d.y_train.tolist() == [0]*6 + [1]*5 and d.y_test.tolist() == [0]*2 + [1]*3
    assert 'as given' in d.source and '128×128' in d.source and d.x_valid is None and d.flip
    assert str(tmp_path) not in d.source

@pytest.mark.parametrize('valid', ['valid', 'val', 'validation'])
def test_train_valid_and_test(tmp_path, valid):
    root = tree(tmp_path/'d', {'train/a': 12, 'train/b': 11, f'{valid}/a': 3, f'{valid}/b': 4, 'test/a': 2, 'test/b': 2})
    dls = get_dls(root, size=16, device='cpu')
    assert [len(dl.dataset) for dl in dls] == [23, 7, 4]
    assert [len(dl.dataset) for dl in get_dls(root, size=16, n_train=10, n_valid=4)] == [10, 4, 4]
    assert [len(dl.dataset) for dl in get_dls(root, size=16, n_valid=0)] == [23, 0, 4]
    d = load_dataset(root, size=16)
    def brightness(x, y): return sorted(zip(x.flatten(1).sum(1).tolist(), y.tolist()))
    assert brightness(dls.valid_ds.x, dls.valid_ds.y)==brightness(d.x_valid, d.y_valid)
    assert torch.equal(dls.train_ds.x.sum(), d.x_train.sum())

def test_valid_without_test_is_what_nothing_is_chosen_on(tmp_path):
    root = tree(tmp_path/'d', {'train/a': 30, 'train/b': 30, 'val/a': 3, 'val/b': 4})
    dls = get_dls(root, size=16)
    assert [len(dl.dataset) for dl in dls] == [54, 6, 7] and "test images from 'val'" in dls.source

def test_one_folder_of_classes_is_cut_by_name(tmp_path):
    root = tree(tmp_path/'d', dict(a=11, b=4, c=2))
    found = find_images(root)
    names = {k: [str(Path(f).relative_to(root)) for f in v] for k,v in found.files.items()}
    assert names['test'] == ['a/img9.png', 'a/img10.png', 'b/img3.png', 'c/img1.png']
    assert names['train'][:9] == [f'a/img{i}.png' for i in range(9)] and len(names['train']) == 13
    assert 'last fifth' in load_dataset(root).source

def test_a_class_of_one_image_trains_and_is_named(tmp_path):
    root = tree(tmp_path/'d', {'common': 20, 'rare': 1})
    with pytest.warns(UserWarning, match='no test image of rare'): dls = get_dls(root, size=16)
    assert dls.train_ds.y.bincount().tolist() == [15, 1] and dls.valid_ds.y.bincount(minlength=2).tolist() == [1, 0]
    learn = Learner(dls, linear(dls), metrics=accuracy).remove_cb(ProgressCallback)
    with learn.no_logging(): learn.fit(1)

def test_a_class_that_test_lacks_is_named(tmp_path):
    root = tree(tmp_path/'d', {'train/a': 3, 'train/b': 3, 'train/c': 3, 'test/a': 2, 'test/c': 1})
    with pytest.warns(UserWarning, match='no test image of b'): d = load_dataset(root)
    assert d.y_test.tolist() == [0,0,2]

@pytest.mark.parametrize('counts, says', [
    ({'train/a': 2, 'train/b': 2, 'test/a': 1, 'test/z': 1}, 'test has classes that train has not, z: give train'),
    ({'train/a': 2, 'test/a': 2}, 'one folder of a class alone'),
    ({'train/a': 2, 'train/b': 0, 'test/a': 2}, 'no image in the class b'),
    ({'train/a': 2, 'train/b': 2, 'test/a': 0}, 'no image in'),
    ({'train/x/a': 1, 'train/y/a': 1, 'train/y/b': 1, 'test/x/a': 1}, 'two classes of one name'),
    ({'.': 3}, 'expected train/<class>')])
def test_folders_that_are_no_data_set(tmp_path, counts, says):
    with pytest.raises(ValueError, match=says): load_dataset(tree(tmp_path/'d', counts))

@pytest.mark.parametrize('name', ['models','__MACOSX'])
def test_folders_that_others_leave_are_no_classes_unless_they_hold_images(tmp_path, name):
    root = tree(tmp_path/'d', {'a': 3, 'b': 3, name: 0})
    assert load_dataset(root).classes==['a','b']
    fill(root/name, 3, 9)
    assert sorted(load_dataset(root).classes)==sorted(['a','b',name])

def test_names_and_folders_are_told_apart(tmp_path, monkeypatch):
    tree(tmp_path/'mine', {'a': 5, 'b': 5})
    monkeypatch.chdir(tmp_path)
    assert load_dataset('mine').name == 'mine' == load_dataset('./mine').name
    with pytest.raises(FileNotFoundError, match='not a folder'): load_dataset('no/where')
    with pytest.raises(ValueError, match='or a folder of images'): load_dataset('nowhere')
    (tmp_path/'digits').mkdir()
    assert len(load_dataset('digits').x_train) == 1000 # a name stays a name

def test_superclasses_from_folders_and_from_a_table(tmp_path):
    root = tree(tmp_path/'a', {f'train/{c}': 4 for c in ('fruit/apple', 'fruit/pear', 'tool/saw')}
        | {f'test/{c}': 2 for c in ('fruit/apple', 'fruit/pear', 'tool/saw')})
    d = load_dataset(root)
    assert d.classes == ['apple', 'pear', 'saw'] and d.coarse_names == ['fruit', 'tool'] and d.coarse.tolist() == [0,0,1]
    assert get_dls(root, coarse=True).c == 2
    flat = tree(tmp_path/'b', {'Red-One': 5, 'blue': 5})
    with pytest.raises(ValueError, match='no superclasses'): get_dls(flat, coarse=True)
    (flat/'hierarchy.csv').write_text('class,coarse_class\nred_one,warm\nBlue,cold\n')
    d = load_dataset(flat)
    assert [d.coarse_names[i] for i in d.coarse] == ['cold', 'warm'] and d.classes == ['blue', 'Red-One']
    (flat/'hierarchy.csv').write_text('class,coarse_class\nblue,cold\n')
    with pytest.raises(ValueError, match='no line for the class Red-One'): load_dataset(flat)

def test_rubbish_beside_the_images_is_left_alone(tmp_path):
    root = tree(tmp_path/'d', {'a': 5, 'b': 5})
    (root/'a'/'notes.txt').write_text('not an image')
    (root/'a'/'.hidden.png').write_text('not an image')
    (root/'a'/'thumbnails').mkdir()
    (root/'.git').mkdir()
    (root/'readme.md').write_text('')
    assert len(load_dataset(root).x_train) == 8


# --- files

def test_modes(tmp_path):
    base = picture(1, 24, 24)
    grey = np.asarray(base.convert('L'))
    clear = base.convert('RGBA')
    clear.putalpha(0)
    Image.fromarray(grey).save(tmp_path/'grey.png')
    Image.fromarray(grey.astype('uint16')*257).save(tmp_path/'grey16.png')
    base.convert('CMYK').save(tmp_path/'cmyk.jpg', quality=95)
    base.convert('P').save(tmp_path/'palette.gif')
    clear.save(tmp_path/'clear.png')
    base.save(tmp_path/'plain.webp', lossless=True)
    want = np.asarray(base).transpose(2,0,1)
    assert (read_image(tmp_path/'plain.webp') == want).all()
    assert (read_image(tmp_path/'grey.png') == grey).all() and read_image(tmp_path/'grey.png').shape == (3,24,24)
    assert (read_image(tmp_path/'grey16.png', 1)[0] == grey).all()
    assert np.abs(read_image(tmp_path/'cmyk.jpg').astype(int) - want).mean() < 6
    assert np.abs(read_image(tmp_path/'palette.gif').astype(int) - want).mean() < 20
    assert (read_image(tmp_path/'clear.png') == 255).all() # nothing on white paper
    Image.fromarray(grey.astype('float32')).save(tmp_path/'float.tif')
    with pytest.raises(ValueError, match='float.tif.*32-bit'): read_image(tmp_path/'float.tif')

@pytest.mark.parametrize('w, h', [(40,20), (20,40), (200,3), (1,1), (16,16)])
def test_any_size_becomes_the_centre_square(tmp_path, w, h):
    im = picture(2, w, h)
    im.save(tmp_path/'a.png')
    side = min(w, h)
    left,top = (w-side)//2,(h-side)//2
    want = im.crop((left, top, left+side, top+side)).resize((16,16), Image.BILINEAR)
    got = read_image(tmp_path/'a.png', size=16)
    assert got.shape == (3,16,16) and np.abs(got.astype(int) - np.asarray(want).transpose(2,0,1)).mean() < 8

def test_exif_orientation_is_obeyed(tmp_path):
    im,exif = picture(3, 32, 16),Image.Exif()
    exif[0x0112] = 6
    im.transpose(Image.Transpose.ROTATE_90).save(tmp_path/'a.png', exif=exif)
    assert (read_image(tmp_path/'a.png') == np.asarray(im).transpose(2,0,1)).all()

def test_all_broken_files_are_named_at_once(tmp_path):
    root = tree(tmp_path/'d', {'a': 10, 'b': 10})
    (root/'a'/'img0.png').write_bytes(b'')
    (root/'b'/'img9.png').write_bytes((root/'b'/'img9.png').read_bytes()[:-40]) # among the test images
    with pytest.raises(ValueError) as e: load_dataset(root)
    assert '2 of 20 files' in str(e.value) and 'img0.png' in str(e.value) and 'img9.png' in str(e.value)
    assert 'repair or delete' in str(e.value)

def test_size_and_channels_by_themselves(tmp_path):
    same = tree(tmp_path/'same', {'a': 5, 'b': 5}, w=20, h=20)
    assert load_dataset(same).x_train.shape == (8,3,20,20) and 'as they are' in load_dataset(same).source
    assert load_dataset(same, size=24).x_train.shape == (8,3,24,24)
    grey = tree(tmp_path/'grey', {'a': 5, 'b': 5}, mode='L')
    assert load_dataset(grey, size=12).x_train.shape == (8,1,12,12)
    picture(9).save(grey/'a'/'img0.png') # one colour image: all become colour
    assert load_dataset(grey, size=12).x_train.shape == (8,3,12,12)

def test_larger_than_memory_is_refused_with_gigabytes(tmp_path, monkeypatch):
    root = tree(tmp_path/'d', {'a': 10, 'b': 10})
    monkeypatch.setattr(images, 'free_memory', lambda: 2e6)
    with pytest.raises(ValueError, match=r'20 images of 3×256×256 bytes take 0.0 GB, but only 0.0 GB'): load_dataset(root, size=256)
    assert len(load_dataset(root, size=64).x_train) == 16
    with pytest.raises(ValueError, match='smaller `size`'): get_dls('digits', size=64)

def test_free_memory_is_a_sensible_number(): assert 1e7 < images.free_memory() < 1e15

def test_decoded_once(tmp_path, monkeypatch):
    root = tree(tmp_path/'d', {'a': 10, 'b': 10})
    a = load_dataset(root, size=32)
    monkeypatch.setattr(images, 'read_image', lambda *a: pytest.fail('decoded twice'))
    assert torch.equal(load_dataset(root, size=32).x_train, a.x_train)

def test_public_data_in_another_size(digits):
    dls = get_dls('digits', 50, size=16)
    assert dls.train_ds.x.shape == (50,1,16,16) and dls.test_ds.x.shape == (797,1,16,16)
    assert torch.equal(dls.train_ds.y, get_dls('digits', 50).train_ds.y)
    assert torch.equal(dls.train_ds.info.mean, digits.mean)
    assert load_dataset('digits', size=12).x_test.shape == (797,1,12,12)

def test_learner_on_a_folder_exports_and_predicts_files(tmp_path):
    root = tree(tmp_path/'d', {'a': 15, 'b': 15})
    dls = get_dls(root, size=16, augment='resized', bs=8, path=tmp_path)
    learn = Learner(dls, linear(dls), metrics=accuracy).remove_cb(ProgressCallback)
    with learn.no_logging(), warnings.catch_warnings(action='ignore'):
        learn.fit(2)
        learn.export('m.pkl')
        label,i,_ = load_learner(tmp_path/'m.pkl').predict(root/'a'/'img3.png')
    x = torch.from_numpy(read_image(root/'a'/'img3.png', 3, 16))
    assert label == dls.vocab[i] and i == learn.get_preds(dl=dls.test_dl([x]))[0].argmax()
    learn.show_results(max_n=2)


# --- harder on purpose

def test_per_class(digits):
    a,b = get_dls('digits', per_class=7),get_dls('digits', 70)
    assert torch.equal(a.train_ds.x, b.train_ds.x) and torch.equal(a.valid_ds.x, b.valid_ds.x)
    with pytest.raises(ValueError, match='give one of them'): get_dls('digits', 70, per_class=7)
    for bad in (0, 91, 2.5):
        with pytest.raises(ValueError, match=f'per_class={bad}'): get_dls('digits', per_class=bad)

uneven = st.lists(st.integers(1, 40), min_size=2, max_size=6)

@settings(max_examples=60, deadline=None)
@given(uneven, st.integers(0, 99))
def test_uneven_pools_validate_a_tenth_of_each_class(counts, seed):
    y = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    train,valid = split_pool(y, seed=seed)
    assert sorted(train.tolist() + valid.tolist()) == list(range(len(y)))
    assert y[valid].bincount(minlength=len(counts)).tolist() == [n//10 for n in counts]
    few,same = split_pool(y, seed=seed, per_class=1)
    assert torch.equal(same, valid) and y[few].bincount().tolist() == [1]*len(counts)
    k = max(n - n//10 for n in counts)
    assert torch.equal(split_pool(y, seed=seed, per_class=k)[0].sort()[0], train.sort()[0])

@pytest.mark.parametrize('rho', [1, 2, 10, 100])
def test_long_tail_is_cuis(rho):
    y = torch.arange(1000) % 10
    got = y[long_tail(y, rho)].bincount()
    cui = [int(100*(1/rho)**(i/9) + 1e-9) for i in range(10)] # get_img_num_per_cls of the authors' code
    assert got.tolist() == [max(n, 1) for n in cui]
    assert long_tail(y, rho).diff().min() > 0

def test_long_tails_are_nested_and_refuse(digits):
    a,b = (get_dls('digits', 500, imbalance=rho).train_ds.x for rho in (20, 5))
    rows = {o.numpy().tobytes() for o in b}
    assert all(o.numpy().tobytes() in rows for o in a) and len(a) < len(b) < 500
    assert get_dls('digits', 500, imbalance=20).valid_ds.y.bincount().tolist() == [10]*10
    for bad in (0, .5, -3, float('inf'), 'a'):
        with pytest.raises(ValueError, match='imbalance='): get_dls('digits', imbalance=bad)

def test_wrong_labels(digits):
    clean,noisy,more = (get_dls('digits', 500, label_noise=p) for p in (0, .2, .5))
    assert clean.train_ds.clean is None and torch.equal(noisy.train_ds.clean, clean.train_ds.y)
    assert torch.equal(noisy.train_ds.x, clean.train_ds.x) and torch.equal(noisy.test_ds.y, clean.test_ds.y)
    wrong,wronger = (d.train_ds.y != clean.train_ds.y for d in (noisy, more))
    assert (wronger | ~wrong).all() and torch.equal(noisy.train_ds.y[wrong], more.train_ds.y[wrong])
    assert .15 < wrong.float().mean() < .25 and .43 < wronger.float().mean() < .57
    assert (noisy.valid_ds.y != clean.valid_ds.y).any() # they come from the same pool
    few = get_dls('digits', 100, label_noise=.2)
    assert torch.equal(few.train_ds.y, noisy.train_ds.y[:100]) # the same images are wrong in every subset
    for bad in (-.1, 1, 1.5, 'a'):
        with pytest.raises(ValueError, match='label_noise='): get_dls('digits', label_noise=bad)

def test_wrong_labels_are_spread_evenly():
    y = torch.zeros(20_000, dtype=torch.long)
    got = noisy_labels(y, .5, 5, seed=1).bincount()
    assert ((got[1:] - 2500.)**2/2500).sum() < 18 and abs(got[0] - 10_000) < 300

def test_wrong_superclasses(digits):
    clean,noisy = get_dls('digits', coarse=True),get_dls('digits', coarse=True, label_noise=.3)
    assert torch.equal(noisy.train_ds.fine, clean.train_ds.fine) and noisy.train_ds.y.max() == 1
    assert .25 < (noisy.train_ds.y != clean.train_ds.y).float().mean() < .35


# --- normalisation of a pretrained network

def test_stats(digits):
    dls = get_dls('digits', 50, stats=dict(mean=(.4,.5,.6), std=(.5,.5,.5), size=224))
    x = (dls.train_ds.x.float()/255 - .5)/.5
    got,_ = dls.train.new(shuffle=False).one_batch()
    torch.testing.assert_close(got, x[:len(got)], rtol=1e-5, atol=1e-5)
    assert torch.equal(dls.test_ds.info.mean, torch.tensor([.5]))
    for bad in ((.5,), ((.5,), (0,))):
        with pytest.raises(ValueError): get_dls('digits', 50, stats=bad)


# --- augmentation

def test_recipes_by_name():
    small,large = (1,8,8),(3,128,128)
    assert make_augment('auto', small) is None and make_augment('auto', (3,32,32)) == Augment(4, True) == make_augment(True, (3,32,32))
    assert isinstance(make_augment('auto', large), BatchTransforms)
    for off in (False, None, 'none'): assert make_augment(off, large) is None
    assert make_augment('crop', (1,28,28), flip=False, padding='symmetric') == Augment(3, False, 'symmetric')
    assert 'Flip' not in repr(make_augment('resized', large, flip=False)) and 'Flip' in repr(make_augment([Flip()], large))
    for bad in ('zz', 3, object(), [3]):
        with pytest.raises(ValueError, match='augment='): make_augment(bad, large)
    with pytest.raises(ValueError, match="padding='zz'"): make_augment('crop', large, padding='zz')

@pytest.mark.parametrize('padding, mode', [('symmetric', 'symmetric'), ('reflect', 'reflect'), ('zeros', 'constant')])
def test_padding_is_numpys(padding, mode):
    x = torch.randint(0, 256, (20,3,8,8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    augment = Augment(2, True, padding)
    draws = augment.draw(20, np.random.default_rng(0))
    for got,im,(dy,dx,mirrored) in zip(augment(x, draws), x, draws):
        want = np.pad(im.numpy(), ((0,0), (2,2), (2,2)), mode=mode)[:,dy:dy+8,dx:dx+8]
        assert (got.numpy() == (want[:,:,::-1] if mirrored else want)).all()
    with pytest.raises(ValueError): Augment(-1)

def test_a_resized_crop_is_the_crop_resized():
    "A crop of the right half, enlarged, against slicing and interpolation"
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mat = torch.tensor([[[.5,0,.5], [0,.5,0]]])
    grid = torch.nn.functional.affine_grid(mat, x.shape, align_corners=False)
    got = torch.nn.functional.grid_sample(x, grid, align_corners=False)
    want = torch.nn.functional.interpolate(x[:,:,4:12,8:], size=16, mode='bilinear')
    torch.testing.assert_close(got[:,:,1:-1,1:-1], want[:,:,1:-1,1:-1], rtol=1e-4, atol=1e-5)

def test_resized_crops_differ_within_a_batch_and_stay_inside():
    torch.manual_seed(0)
    mats = resized_crop_mat(torch.zeros(500,3,4,4), .2)
    assert (mats[:,:2,:2].sum(2) + mats[:,:2,2].abs()).max() <= 1 + 1e-6 and len(mats[:,0,0].unique()) > 400
    area,aspect = mats[:,0,0]*mats[:,1,1],mats[:,0,0]/mats[:,1,1]
    assert area.min() > .19 and area.max() <= 1 and aspect.min() > .74 and aspect.max() < 1.34

transforms = [[Flip(), Rotate(20), Brightness(.3)], [RandomErasing(1.)], 'resized', 'full']

@pytest.mark.parametrize('augment', transforms, ids=str)
def test_fastais_transforms_are_seeded_resumable_and_keep_to_themselves(digits, augment):
    def loader(**kw): return get_dls('digits', 60, bs=20, augment=augment, seed=3, size=16, device='cpu').train.new(**kw)
    torch.manual_seed(1)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    whole = loader()
    passes = [list(whole) for _ in range(3)]
    assert torch.equal(torch.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()
    torch.manual_seed(2)
    resumed = loader(epoch=1)
    for want in passes[1:]:
        for (x,y),(x1,y1) in zip(resumed, want, strict=True): assert torch.equal(x, x1) and torch.equal(y, y1)
    assert not torch.equal(passes[0][0][0], passes[1][0][0]) and torch.isfinite(passes[0][0][0]).all()
    assert type(passes[0][0][0]) is torch.Tensor and passes[0][0][0].shape == (20,1,16,16)
    plain = loader(shuffle=False)
    assert torch.equal(torch.cat([x for x,_ in plain]), torch.cat([x for x,_ in loader(shuffle=False, augment=None)]))
    pickle.loads(pickle.dumps(whole))
    whole.show_batch(unique=True, max_n=3)

def test_channels_last_survives_transforms():
    x,y = torch.randint(0, 256, (20,3,16,16), dtype=torch.uint8),torch.arange(20) % 2
    from phantom_nb.data import ImageData, DatasetSpec
    data = ImageData.create('noise', (x,y), (x,y), 'noise', DatasetSpec(['a','b'], dict(a=['a'], b=['b']), (3,16,16), True))
    a,b = (get_dls(data, n_valid=0, augment='full', channels_last=last, device='cpu').one_batch()[0] for last in (False, True))
    torch.testing.assert_close(a, b)
    assert b.is_contiguous(memory_format=torch.channels_last)
    learn_in = ImageDL(ImageSet(x, y, data), 8, True, augment=make_augment('full', (3,16,16)))
    assert len(list(learn_in)) == 3

def test_threads_that_start_at_once_decode_once(tmp_path, monkeypatch):
    "All find the cache empty; one decodes, the others wait for it"
    fill(tmp_path, 4)
    files,seen,gate = sorted(tmp_path.glob('*.png')),[],threading.Barrier(3)
    def slow(path, *args):
        seen.append(path)
        time.sleep(.02)
        return read_image(path, *args)
    monkeypatch.setattr(images, 'read_image', slow)
    class Gate(images.FileLock):
        def __enter__(self):
            gate.wait(20)
            return super().__enter__()
    monkeypatch.setattr(images, 'FileLock', Gate)
    with ThreadPoolExecutor(3) as pool: found = list(pool.map(lambda _: images.cached_images(files, 3, 8), range(3)))
    assert len(seen) == 4+1 and all(torch.equal(x, found[0]) for x in found) # one more for the shape

def test_photos_that_results_name_are_found_where_data_sets_lie(tmp_path, monkeypatch):
    tree(tmp_path/'trashnet', {'train/glass': 4, 'train/metal': 4, 'test/glass': 2, 'test/metal': 2})
    assert load_dataset('trashnet', tmp_path, size=16).x_train.shape == (8,3,16,16)
    run, = name_images([Run(data='trashnet', size=16)])
    assert run.images == '' # known by name, like a public data set
    monkeypatch.setenv('PHANTOM_NB_DATA', str(tmp_path))
    assert get_dls('trashnet', size=16, n_valid=0, device='cpu').c == 2
    monkeypatch.delenv('PHANTOM_NB_DATA')
    with pytest.raises(FileNotFoundError, match="Thung and Yang"): load_dataset('trashnet')

def test_fastais_transforms_act_on_what_they_are_for():
    "Applied in training; grey images are grey to them; the recipes differ in light and turns, none zooms beyond the cut"
    seen = []
    class Spy(Transform):
        def encodes(self, x:TensorImage):
            seen.append(type(x))
            return x
    x = torch.rand(4, 1, 32, 32)
    assert BatchTransforms([Flip(p=1.)])(x, 0).allclose(x.flip(3), atol=1e-5)
    for channels in (1, 3): BatchTransforms([Spy()])(torch.rand(2, channels, 8, 8), 0)
    assert seen==[TensorImageBW, TensorImage]
    resized,full = [make_augment(name, (3,128,128)) for name in ('resized','full')]
    assert 'Brightness' in repr(full) and 'Brightness' not in repr(resized)
    def turns(augment): return [f for t in augment.transforms.fs for f in getattr(t, 'aff_fs', [])]
    # fastai joins them in one step: cut, flip, turn; a zoom would be one more
    assert (len(turns(resized)), len(turns(full)))==(2, 3)

# Names in any script, and what is left out

@pytest.mark.parametrize('names', [('猫','犬'), ('кошка','собака'), ('größe','grüße'), ('C','C++'), ('+1','-1')], ids=str)
def test_classes_have_names_in_any_script(tmp_path, names):
    for split in ('train','test'): tree(tmp_path/split, dict.fromkeys(names, 2))
    found = find_images(tmp_path)
    assert sorted(found.classes)==sorted(names)
    for split in ('train','test'): assert [Path(f).parent.name for f in found.files[split]]==[found.classes[i] for i in found.labels[split]]

def test_a_class_in_another_script_is_no_other_class(tmp_path):
    tree(tmp_path/'train', {'dog':2, '猫':2})
    tree(tmp_path/'test', {'dog':2, '犬':2})
    with pytest.raises(ValueError, match='test has classes that train has not, 犬: give train'): find_images(tmp_path)

def test_names_with_raised_digits_count_as_letters(tmp_path):
    tree(tmp_path, {'a':2, 'b':2})
    (tmp_path/'a'/'img0.png').rename(tmp_path/'a'/'5²3.png')
    assert len(sum(find_images(tmp_path).files.values(), []))==4

@pytest.mark.parametrize('train,test', [('train','Test'), ('Train','TEST'), ('Training','Testing')])
def test_splits_in_capitals(tmp_path, train, test):
    tree(tmp_path/train, {'a':3, 'b':3})
    tree(tmp_path/test, {'a':1, 'b':2})
    found = find_images(tmp_path)
    assert found.own_test and len(found.files['test'])==3 and has_test_images(str(tmp_path))

def test_photos_by_name_bring_their_test_images(tmp_path, monkeypatch):
    monkeypatch.setenv('PHANTOM_NB_DATA', str(tmp_path))
    for split in ('train','test'): tree(tmp_path/'trashnet'/split, {'a':3, 'b':3})
    assert has_test_images('trashnet') and has_test_images('digits')

def test_pictures_that_nobody_reads_are_named(tmp_path):
    tree(tmp_path, {'a':3, 'b':3})
    for i in range(4): (tmp_path/'a'/f'{i}.heic').write_bytes(b'x')
    fill(tmp_path/'b'/'more', 2)
    with pytest.warns(UserWarning) as told: find_images(tmp_path)
    words = ' '.join(str(w.message) for w in told)
    assert '4 images (.heic) are left out' in words and f"left out: {tmp_path/'b'/'more'}" in words

def test_a_link_to_nowhere_and_a_far_too_large_image_are_named(tmp_path, monkeypatch):
    tree(tmp_path, {'a':3, 'b':3})
    (tmp_path/'a'/'gone.png').symlink_to(tmp_path/'nowhere.png')
    with pytest.raises(ValueError, match='gone.png is not a readable image'): load_dataset(tmp_path)
    (tmp_path/'a'/'gone.png').unlink()
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100) # half of what is refused
    with pytest.raises(ValueError, match='readable image'): load_dataset(tmp_path)

def test_a_folder_may_be_called_as_a_data_set_in_other_letters(tmp_path, monkeypatch):
    tree(tmp_path/'Digits', {'cat': 4, 'dog': 4})
    monkeypatch.chdir(tmp_path)
    assert load_dataset('Digits').classes==['cat','dog'] and name_images([Run(data='Digits', n_train=4)])[0].images
    monkeypatch.chdir('/')
    assert load_dataset('Digits').name=='digits' # there is no such folder here

def test_names_that_count_alike_have_an_order(tmp_path):
    for name in ('01', '0', '001', '1'): fill(tmp_path/'a', 1) or (tmp_path/'a'/'img0.png').rename(tmp_path/'a'/f'{name}.png')
    assert [Path(f).stem for f in images.image_files(tmp_path/'a')]==['0', '001', '01', '1']

def test_names_in_an_old_encoding_are_read(tmp_path):
    tree(tmp_path/'d', {'a': 3, 'b': 3})
    os.rename(os.fsencode(tmp_path/'d'/'a'/'img0.png'), os.fsencode(tmp_path/'d'/'a')+b'/caf\xe9.png')
    assert len(load_dataset(tmp_path/'d').x_train)+len(load_dataset(tmp_path/'d').x_test)==6 and name_images([Run(data=str(tmp_path/'d'), n_train=2)])[0].images

@pytest.mark.parametrize('counts', [{'test/a': 2, 'test/b': 2}, {'test/a': 2, 'test/b': 2, 'val/a': 2, 'val/b': 2}], ids=str)
def test_a_test_part_alone_trains_nothing(tmp_path, counts):
    with pytest.raises(ValueError, match="there is 'test' and no train"): load_dataset(tree(tmp_path/'d', counts))

@pytest.mark.parametrize('kw,what', [(dict(size=0), 'size=0'), (dict(size=8.5), 'size=8.5'), (dict(n_train='100'), "n_train='100'")], ids=str)
def test_wrong_numbers_for_loaders_are_named(kw, what):
    with pytest.raises(ValueError, match=what): get_dls('digits', **kw)

def test_a_class_may_be_called_train(tmp_path):
    tree(tmp_path, dict(train=6, bus=6, car=6))
    data = load_dataset(str(tmp_path))
    assert data.classes==['bus','car','train'] and len(data.x_train)+len(data.x_test)==18

@pytest.mark.parametrize('others', [['test1'], ['valid','masks'], ['test'], ['val_2']])
def test_images_of_a_split_without_classes_are_no_class(tmp_path, others):
    tree(tmp_path, {'train':6, **{name:6 for name in others}})
    with pytest.raises(ValueError, match='no folder of a class in .*train'): load_dataset(str(tmp_path))

def test_a_folder_of_ones_own_with_the_name_of_a_known_one_is_followed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree(tmp_path/'trashnet', dict(a=4, b=4))
    def digest(data): return name_images([Run(data=data, n_train=4)])[0].images
    before = digest('trashnet')
    (tmp_path/'trashnet/a/img0.png').unlink()
    assert before and digest('trashnet')==digest('./trashnet')!=before and _same_name('trashnet')=='./trashnet'
