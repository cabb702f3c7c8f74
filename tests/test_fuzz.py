"Five hundred wrong inputs: each is refused in one sentence for all that is wrong, with status 2, and nothing is written"
import json, random, string
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from phantom_nb import cli
from phantom_nb.experiments.sweep import KEYS, TUNE, load_sweep

def refused(args, folder, capsys):
    "The sentence that a command line is refused with; the folder is as it was"
    before = sorted(folder.rglob('*'))
    capsys.readouterr()
    with pytest.raises(SystemExit) as e: cli.main(args)
    said = capsys.readouterr()
    assert e.value.code==2 and said.out=='', (args, e.value.code, said)
    assert said.err.startswith('phantom_nb: ') and said.err.count('\n')==1 and 'Traceback' not in said.err, (args, said.err)
    assert sorted(folder.rglob('*'))==before, args
    return said.err

@pytest.fixture
def folder(tmp_path, monkeypatch):
    "An empty folder to stand in, beside a file that is no folder"
    (tmp_path/'here').mkdir()
    (tmp_path/'file').write_text('no folder')
    monkeypatch.chdir(tmp_path/'here')
    return tmp_path

def junk(rng, n=6): return ''.join(rng.choice(string.ascii_letters+'_') for _ in range(rng.randint(1, n)))+'zz'

# option -> wrong values, each with words that its refusal must have; {} is something made up
WHOLE = {'{}':"give a whole number", '1.5':"give a whole number", '0':'=0', '-3':'=-3'}
COMPARE = {'--data':{'{}':"data='{}'", './{}':"data='./{}'"}, '--n-train':WHOLE, '--seeds':WHOLE | {'999999':'seeds=999999'}, '--epochs':WHOLE, '--jobs':WHOLE, '--size':WHOLE,
    '--methods':{'{}':"method='{}'", 'mixup,{}':"method='{}'", 'none+mhe':'leave out none', 'mhe+mhe':'occurs twice', ',':"method=''"},
    '--model':{'{}':"model='{}'", 'timm:':"model='timm:'", 'timm:a b':"model='timm:a b'"}, '--augment':{'{}':"augment='{}'"}, '--precision':{'{}':"precision='{}'"},
    '--lr':{'{}':'give a number', '0':'lr=0', '-1':'lr=-1', 'nan':'lr=nan', 'inf':'lr=inf'}, '--time-budget':{'{}':'write a duration', '0':'write a duration', '-5s':'write a duration'},
    '--out':{'../file':'is a file'}, '--root':{'{}':"root='{}' is not a folder"}, '--{}':{'3':"option='--{}'", '{}':"option='--{}'"}}
SWEEP = {'--engine':{'{}':"engine='{}'"}, '--jobs':WHOLE, '--time-budget':COMPARE['--time-budget'], '--root':COMPARE['--root'], '--out':{'../file':'is a file'}, '--{}':{'':"option='--{}'"}}
RESULTS = {'--export':{'{}':"'{}': give a file name that ends in", '../file/x.csv':'is a file'}, '--plot':{'{}.gif':"'{}.gif'", '../file/x.png':'is a file'}, '--where':{'{}':"--where '{}'"},
    '--{}':{'':"option='--{}'"}}
MEASURE = {'--n':WHOLE | {'0':'n=0'}, '--size':WHOLE, '--data':COMPARE['--data'], '--plot':{'{}.gif':"'{}.gif'", '{}/x.png':'the folder does not exist'}, '--root':COMPARE['--root']}
REPORT = {'--n-train':WHOLE, '--size':WHOLE, '--data':COMPARE['--data'], '--root':COMPARE['--root'], '--{}':{'':"option='--{}'"},
    '--out':{'{}.pdf':"'{}.pdf'", '{}':"'{}'", '../file/x.html':'is a file'}}
NUMBER = {'{}':'give a number', 'nan':'=nan', 'inf':'=inf', '-1':'=-1'}
SUGGEST = {'--classes':WHOLE | {'1':'classes=1'}, '--per-class':NUMBER | {'0':'per_class=0'}, '--wrong-labels':NUMBER | {'1':'wrong_labels=1'},
    '--imbalance':NUMBER | {'.5':'imbalance=0.5'}, '--pretrained=yes':{'':'give --pretrained alone'}, '--{}':{'':"option='--{}'"}}
GPU = {'--out':{'../file':'is a file', '/dev/null/{}':'is a file'}, '--listed=yes':{'':'give --listed alone'}, '--{}':{'':"option='--{}'"}}
COMMANDS = dict(suggest=([], {}, SUGGEST), report=(['gone.pkl'], {"no learner at 'gone.pkl'"}, REPORT), gpu=(['tests3'], {"piece='tests3'"}, GPU),
    compare=([], {}, COMPARE), sweep=(['gone.toml'], {'gone.toml does not exist'}, SWEEP), results=(['gone'], {'gone does not exist'}, RESULTS),
    measure=(['gone.pkl'], {"no learner at 'gone.pkl'"}, MEASURE), bench=(['speed'], {"benchmark='speed'"}, {'--out':{'../file':'is a file'}, '--{}':{'':"option='--{}'"}}),
    data=(['mnist3'], {"data='mnist3'"}, {'--root':COMPARE['--root'], '--{}':{'':"option='--{}'"}}))

def wrong_command(rng):
    "A command line with one to four things wrong, and the words that must be said"
    name = rng.choice(list(COMMANDS)) if rng.random()<.7 else 'compare'
    places,words,table = COMMANDS[name]
    args,said = list(places),set(words)
    n = min(rng.randint(0 if places else 1, 4), len(table))
    chosen = rng.sample(list(table), n)
    if name=='suggest': said |= {f'{option}: give a number' for option in ('--classes','--per-class') if option not in chosen}
    for option in chosen:
        made = junk(rng)
        value,what = rng.choice(list(table[option].items()))
        option = option.format(made)
        value = value.format(made)
        said.add(what.format(made))
        args += [f'{option}={value}'] if rng.random()<.5 and value else [option, value] if value else [option]
    return [name, *args], said

@pytest.mark.parametrize('seed', range(35))
def test_wrong_command_lines(seed, folder, capsys):
    rng = random.Random(seed)
    for _ in range(10):
        args,said = wrong_command(rng)
        told = refused(args, folder, capsys)
        for what in said: assert what in told, (args, what, told)

def toml(value):
    "A value as TOML says it"
    if isinstance(value, dict): return '{' + ', '.join(f'{json.dumps(k)} = {toml(v)}' for k,v in value.items()) + '}'
    if isinstance(value, list): return '[' + ', '.join(map(toml, value)) + ']'
    return json.dumps(value).replace('Infinity', 'inf').replace('NaN', 'nan')

words = st.text('abcdefgh_+. /\\"\'', max_size=6)
plain = st.none().map(lambda _: 'none') | st.booleans() | st.integers(-3, 10**6) | st.integers(10**18, 10**30) | st.floats() | words
values = st.recursive(plain, lambda o: st.lists(o, max_size=3) | st.dictionaries(words, o, max_size=2), max_leaves=4)
methods = st.sampled_from(['none','mixup','mhe','half_mhe','phantom','mixup+half_mhe','targeted_sparsity','norm','cutmix','sam'])
fields = st.dictionaries(st.sampled_from([k for k in KEYS if k not in ('settings','tune','runs')]) | words, values, max_size=4)
names = st.sampled_from(['lam','alpha','s','k','mode','layers','kind','rho','every'])
settings_table = st.dictionaries(methods, st.dictionaries(names, values, max_size=2) | values, max_size=2)
tune_table = st.dictionaries(st.sampled_from([*TUNE]) | words, values, max_size=2)
spec = st.fixed_dictionaries({}, optional=dict(methods=st.lists(methods, max_size=2) | values, settings=settings_table | values,
    tune=tune_table | values, runs=st.lists(fields, max_size=2) | values, seeds=st.integers(-1, 3) | values))

COUNT = dict(wrong=0)

@given(spec, fields)
@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_wrong_files(folder, capsys, top, more):
    path = folder/'here'/'x.toml'
    path.write_text('\n'.join(f'{json.dumps(k)} = {toml(v)}' for k,v in {**more, **top}.items()))
    try: load_sweep(path)
    except ValueError as e:
        COUNT['wrong'] += 1
        told = refused(['sweep', 'x.toml'], folder, capsys)
        assert told.startswith('phantom_nb: x.toml: ')

def test_enough_wrong_files_were_tried(): assert COUNT['wrong']==0 or COUNT['wrong']>=250

SLIPS = dict(lr=('fast', "lr='fast'"), epochs=(0, 'epochs=0'), epoch=(3, "did you mean 'epochs'"), model=('resnet1', "model='resnet1'"), data=('digit', "data='digit'"), seeds=(0, 'seeds=0'),
    methods=(['mpu'], "method='mpu'"), n_train=([], 'n_train=[]'), opt=('sdg', "opt='sdg'"), mom=(1.5, 'mom=1.5'), trace=('all', "trace='all'"), schedule=('step:2', "schedule='step:2'"),
    compile=('yes', "compile='yes'"), folds=(1, 'folds=1'), label_noise=(2, 'label_noise=2'), n_valid=(-1, 'n_valid=-1'))

@pytest.mark.parametrize('seed', range(50))
def test_every_slip_of_a_file_is_named(seed, folder, capsys):
    rng = random.Random(seed)
    chosen = rng.sample(list(SLIPS), rng.randint(2, 5))
    Path('x.toml').write_text('\n'.join(f'{k} = {toml(SLIPS[k][0])}' for k in chosen))
    told = refused(['sweep', 'x.toml', '--engine', 'slurm'], folder, capsys)
    for k in chosen: assert SLIPS[k][1] in told, (chosen, told)
    assert "engine='slurm'" in told

@pytest.mark.parametrize('content', [b'\xff\xfe\x00', b'', b'\x00', b'[[[', b'a'*10**5, b'=', b'[runs]\n', b'seeds = ' + b'9'*5000], ids=lambda b: repr(b[:8]))
def test_files_that_are_no_experiments(content, folder, capsys):
    Path('x.toml').write_bytes(content)
    if content: refused(['sweep', 'x.toml'], folder, capsys)
    Path('rows.jsonl').write_bytes(content)
    refused(['results', 'rows.jsonl'], folder, capsys)
    Path('learner.pkl').write_bytes(content)
    refused(['measure', 'learner.pkl'], folder, capsys)
    refused(['report', 'learner.pkl'], folder, capsys)

@pytest.mark.parametrize('args', [['results','.'], ['sweep','.'], ['measure','.'], ['data','--root','/dev/null'], ['bench'], ['sweep'], ['measure','x','y'], ['compar'], ['--verbose'], ['compare','digits'],
    ['compare','-n','5'], ['compare','--pretrained=yes'], ['compare','--seeds'], ['gpu','nothing'], ['report'], ['report','.'], ['report','x','y'], ['suggest'], ['suggest','3'], ['suggest','--classes','3'], ['compare','--out','/dev/null/x']], ids=str)
def test_other_slips(args, folder, capsys): refused(args, folder, capsys)

def test_a_folder_that_cannot_be_written_is_named(folder, capsys, monkeypatch):
    monkeypatch.setattr(cli.os, 'access', lambda path, mode: 'locked' not in str(path))
    (folder/'here'/'locked').mkdir()
    for args in (['compare','--out','locked/x'], ['results','.','--export','locked/a.csv'], ['bench','energy','--out','locked']):
        assert "locked' cannot be written" in refused(args, folder, capsys)
