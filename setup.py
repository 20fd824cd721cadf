"Packaging of llmft: every value comes from settings.ini."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

config = ConfigParser(delimiters=['='])
config.read(Path(__file__).parent / 'settings.ini', encoding='utf-8')
settings = config['DEFAULT']


def requirements(key):
    "The space-separated requirements that `key` of settings.ini holds."
    return settings.get(key, '').split()


setup(
    name=settings['lib_name'],
    version=settings['version'],
    description=settings['description'],
    long_description=(Path(__file__).parent / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    url=settings['git_url'],
    author=settings['author'],
    author_email=settings['author_email'],
    license='Apache-2.0',
    keywords=settings['keywords'],
    packages=find_packages(include=['llmft', 'llmft.*']),
    package_data={'llmft': ['assets/**/*']},
    include_package_data=True,
    python_requires=f">={settings['min_python']},<3.14",
    install_requires=requirements('requirements'),
    extras_require={name: requirements(f'{name}_requirements') for name in ('dev', 'bench')},
    entry_points={'console_scripts': settings['console_scripts'].split(), 'nbdev': ['llmft=llmft._modidx:d']},
    zip_safe=False,
)
