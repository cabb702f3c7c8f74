"Read the package's metadata from settings.ini, its version from phantom_nb/__init__.py"
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
version = re.search(r"__version__\s*=\s*['\"]([^'\"]+)", (here/'phantom_nb/__init__.py').read_text())[1]
extras = {o: cfg[f'{o}_requirements'].split() for o in ('dev', 'cluster', 'tune', 'pretrained')}

readme = (here/'README.md').read_text(encoding='utf-8')
scripts = dict(console_scripts=cfg['console_scripts'].split(), nbdev=['phantom_nb=phantom_nb._modidx:d'])

# chkstyle: ignore-node
setup(name=cfg['lib_name'], version=version, description=cfg['description'], keywords=cfg['keywords'].split(),
    author=cfg['author'], author_email=cfg['author_email'], license=cfg['license'], long_description=readme,
    long_description_content_type='text/markdown', package_dir={'':'.'}, packages=find_packages(include=['phantom_nb', 'phantom_nb.*']),
    python_requires=f">={cfg['min_python']}", install_requires=cfg['requirements'].split(), extras_require=extras,
    entry_points=scripts, package_data={'phantom_nb':['*.mplstyle','*.json','*.pyi','py.typed']})
