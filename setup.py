"""Which folders are the package: those that src/tileformer links to, or the root's where a copy lost the links."""

import os

from setuptools import find_packages, setup

ROOMS = ("kernels", "decoder", "training", "bench")
if all(os.path.isdir(f"src/tileformer/{room}") for room in ROOMS):  # a checkout, or a source distribution
    packages, folders = find_packages("src"), {"": "src"}
elif all(os.path.isfile(f"{room}/__init__.py") for room in ROOMS):  # an archive or a file system without links
    packages = ["tileformer", *(f"tileformer.{name}" for room in ROOMS for name in find_packages(include=[f"{room}*"]))]
    folders = {"tileformer": "src/tileformer", **{f"tileformer.{room}": room for room in ROOMS}}
else:
    raise SystemExit(
        f"tileformer is not whole here: {', '.join(ROOMS)} are neither in {os.getcwd()} nor in src/tileformer"
    )
setup(packages=packages, package_dir=folders)
