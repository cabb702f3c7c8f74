"Which one for me: what is near, what is recommended, and what is said"
import json, math

import pytest

from phantom_nb.experiments.methods import METHODS
from phantom_nb.experiments.suggest import Setting, distance, effects_near, load_table, nearest_settings, suggest

def _effects(a, b, half=.2): return dict(a=dict(diff=a, half=half, weight='alpha=1'), b=dict(diff=b, half=half, weight='alpha=2'))

@pytest.fixture
def table():
    settings = {name:dict(classes=10, per_class=n, pretrained=False, wrong_labels=0., imbalance=1., about=f'{n} images')
        for name,n in dict(a=10, b=40, c=10_000).items()}
    methods = dict(mixup=dict(helps='yes', cost=1., effects=_effects(1., 2.)), sam=dict(helps='yes', cost=2., effects=_effects(1.5, 2.1)),
        isda=dict(helps='unclear', cost=1., effects=_effects(5., 5.)), srip=dict(helps='no', cost=1., effects=_effects(-1., -1.)))
    return dict(settings=settings, methods=methods)

def test_distance_is_symmetric_and_zero_at_home():
    a,b = Setting(31, 5, True, .2, 4.),Setting(10, 100)
    assert distance(a, a)==0 and distance(a, b)==distance(b, a)
    assert distance(a, b)==pytest.approx(math.hypot(math.log2(3.1)/2, math.log2(20), 3, 2, 2))

@pytest.mark.parametrize('wrong', [dict(classes=1), dict(per_class=0), dict(wrong_labels=1.), dict(imbalance=.5)])
def test_numbers_that_no_data_set_has(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))): Setting(**dict(classes=10, per_class=10) | wrong)

def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(ValueError, match='(?s)classes.*imbalance'): Setting(1, 10, imbalance=0)

def test_the_mean_of_the_nearest(table):
    assert [name for name,_ in nearest_settings(Setting(10, 20), table)]==['a','b']
    found = {effect.method:effect for effect in effects_near(Setting(10, 20), table)}
    assert found['mixup'].mean==1.5 and found['mixup'].half==pytest.approx(.2/2**.5) and found['mixup'].weight=='alpha=1'

def test_only_what_helps_everywhere_is_recommended(table):
    said = suggest(Setting(10, 20), table)
    assert "Recommended: sam, alpha=1" in said and "As good, to half a point: mixup" in said and "2.0 times as long" in said
    table["methods"]["mixup"]["cost"] = 3.
    assert "As good" not in suggest(Setting(10, 20), table)

@pytest.mark.parametrize('effects', [_effects(.3, .3), _effects(1., 1., 3.)])
def test_plain_is_an_answer(table, effects):
    for told in table['methods'].values(): told['effects'] = effects
    assert 'Recommended: plain good practice' in suggest(Setting(10, 20), table)

def test_gains_nearby_are_named_and_doubted(table):
    "Not shown to help everywhere, but clear in all nearest settings: named, not recommended; a mixed one is not"
    effects = dict(yes=_effects(2., 2.), mixed=_effects(.1, 5.))
    told = suggest(Setting(10, 50), table|dict(methods={m:dict(helps='unclear', cost=1., effects=e) for m,e in effects.items()}))
    line = next(line for line in told.splitlines() if 'Gained in the nearest' in line)
    assert 'Recommended: plain' in told and 'yes (+2.0 points)' in line and 'by chance' in line and 'mixed' not in line

def test_what_a_setting_shows_by_itself_is_said(table):
    "Shown to help or to harm in one of the nearest settings, corrected for all: said, with a way to try it, also where it is not among the first"
    helped = dict(helps='unclear', cost=1., effects=dict(a=dict(diff=3.5, half=0.4, weight='lam=3', helps='yes')))
    harmed = dict(helps='unclear', cost=1., effects=dict(b=dict(diff=-1.5, half=0.4, weight='lam=1', helps='no')))
    methods = dict(targeted_sparsity=helped, phantom_margin=harmed)
    said = suggest(Setting(10, 20), table|dict(methods=methods))
    assert '+3.5*' in said and '-1.5*' in said and 'by chance' not in said and 'Recommended: plain' in said
    assert "Shown to help in a, corrected" in said and '--methods targeted_sparsity:lam=3' in said and 'Shown to harm in b: phantom_margin' in said
    assert 'Shown to' not in suggest(Setting(10, 9_000), table|dict(methods=methods), n=1) # neither is near

def test_the_steps_are_explained(table): assert all(word in suggest(Setting(10, 20), table) for word in ('pretrained or not','wrong labels','imbalance'))

def test_far_away_is_said(table):
    assert 'Take care' not in suggest(Setting(10, 20), table)
    assert suggest(Setting(10, 20, pretrained=True), table).startswith('Take care')
    assert 'Take care: the nearest setting is 10.' in suggest(Setting(10, 20, wrong_labels=.9, imbalance=30), table)

def test_the_table_that_comes_with_the_package():
    table = load_table()
    assert set(table)=={'settings','methods'} and set(table['methods'])<=set(METHODS)
    for told in table['methods'].values():
        assert told['helps'] in ('yes','no','unclear') and set(told['effects'])<=set(table['settings'])
    for name,told in table['settings'].items():
        fields = {k:v for k,v in told.items() if k!='about'}
        assert nearest_settings(Setting(**fields), table)[0]==(name, 0.) or nearest_settings(Setting(**fields), table)[1]==(name, 0.)
    assert "Recommended: " in suggest(Setting(31, 10, pretrained=True))
    json.dumps(table)

def test_the_command():
    from typer.testing import CliRunner
    from phantom_nb.cli import app
    found = CliRunner().invoke(app, ['suggest','--classes','31','--per-class','10','--pretrained'])
    assert found.exit_code==0 and 'Recommended: ' in found.output

def test_the_command_counts_a_folder(tmp_path):
    from PIL import Image
    from typer.testing import CliRunner
    from phantom_nb.cli import app
    for name,n in dict(a=4, b=8).items():
        (tmp_path/'photos'/'train'/name).mkdir(parents=True)
        for i in range(n): Image.new('RGB', (8, 8), (i, 0, 0)).save(tmp_path/'photos'/'train'/name/f'{i}.png')
    found = CliRunner().invoke(app, ['suggest','--data',str(tmp_path/'photos')])
    assert found.exit_code==0, found.output
    assert '2 classes' in found.output and 'Nearest settings' in found.output

def test_the_lines_where_the_rule_turns(table):
    "An interval that leaves zero out, two steps; five methods have lines of their own"
    def effect(mean, half): return {m:dict(helps='yes', cost=1., effects=_effects(mean, mean, half)) for m in ('mixup',)}
    assert 'Recommended: mixup' in suggest(Setting(10, 20), table|dict(methods=effect(1., 1.2)))
    assert 'Recommended: plain' in suggest(Setting(10, 20), table|dict(methods=effect(1., 1.6)))
    far = suggest(Setting(10, 400_000), table)
    assert far.startswith('Take care: the nearest setting is 5.3 steps away, so') and 'began' not in far
    assert suggest(Setting(10, 56_000), table).startswith('Take care') and not suggest(Setting(10, 38_000), table).startswith('Take care')
    names = ['mixup','sam','isda','srip','cutmix','dropout','weight_decay']
    many = {m:dict(helps='unclear', cost=1., effects=_effects(9.-i, 9.-i)) for i,m in enumerate(names)}
    said = suggest(Setting(10, 20), table|dict(methods=many))
    assert sum(line.strip().split()[0] in names for line in said.splitlines() if line.startswith('  '))==5 and 'and less: dropout +4.0, weight_decay +3.0' in said
