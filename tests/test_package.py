"The package as others get it: a wheel that holds what it needs and nothing else, in a folder of its own"
import os, re, subprocess, sys, zipfile
from importlib.util import find_spec

import pytest
from test_project import ROOT, copy_tree, tool

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "The wheel, built from a copy of the project's files."
    root,to = copy_tree(tmp_path_factory.mktemp('project')),tmp_path_factory.mktemp('wheel')
    options = ['--no-deps', '--quiet', '--disable-pip-version-check']
    if find_spec('setuptools'): options.append('--no-build-isolation') # else pip fetches it
    tool(root, sys.executable, '-m', 'pip', 'wheel', '.', *options, '--wheel-dir', str(to))
    return next(to.glob('*.whl'))

@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
    "A folder with the wheel's content alone, and how to run Python with it and without the checkout."
    to = tmp_path_factory.mktemp('site')
    tool(to, sys.executable, '-m', 'pip', 'install', '--no-deps', '--quiet', '--disable-pip-version-check', '--target', str(to), str(wheel))
    env = dict(os.environ, PYTHONPATH=str(to), MPLBACKEND='agg')
    def run(code):
        done = subprocess.run([sys.executable, '-c', code], cwd=to, env=env, capture_output=True, text=True)
        assert done.returncode==0, done.stderr[-2000:]
        return done.stdout.strip()
    return to,run

def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert all(name.startswith(('phantom_nb/', 'phantom_nb-')) for name in names), names
    kinds = {name.rpartition('.')[2] for name in names if name.startswith('phantom_nb/')} - {'typed'}
    assert kinds=={'py','pyi','json','mplstyle'}, kinds
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT/'phantom_nb').rglob('*.py')}
    assert modules<=set(names), modules-set(names)
    assert wheel.stat().st_size<1e6

def test_its_metadata_is_that_of_the_settings(wheel):
    with zipfile.ZipFile(wheel) as z:
        text = z.read(next(n for n in z.namelist() if n.endswith('METADATA'))).decode()
        scripts = z.read(next(n for n in z.namelist() if n.endswith('entry_points.txt'))).decode()
    assert 'Requires-Dist: torch' in text and re.search('License.*: Apache-2.0', text) and 'phantom_nb = phantom_nb.cli:main' in scripts
    assert '# phantom_nb' in text # the README is its description

def test_it_works_where_the_checkout_is_not(installed):
    to,run = installed
    told = run('import phantom_nb; print(phantom_nb.__file__)')
    assert told.startswith(str(to)), told
    assert 'phantom_nb' in run("from phantom_nb.cli import main\ntry: main(['--version'])\nexcept SystemExit: pass")

def test_its_tables_are_read_from_the_wheel(installed):
    "A regularizer trains, recorded networks are compared with, the atlas answers, the house style is found"
    _,run = installed
    out = run('''
from fastai.vision.all import Learner
from phantom_nb import MHE, create_model, get_dls
from phantom_nb.experiments.diagnose import diagnose
from phantom_nb.experiments.report import house_style
from phantom_nb.experiments.suggest import Setting, suggest
house_style()
learn = Learner(get_dls('digits', n_train=100, device='cpu'), create_model('small_cnn', size=8), cbs=MHE(.1))
with learn.no_bar(), learn.no_logging(): learn.fit(1)
found = diagnose(learn)
print(found.bands['networks'], 'Recommended' in suggest(Setting(10, 20)))''')
    n,recommends = out.split()[-2:]
    assert int(n)>=20 and recommends=='True'
