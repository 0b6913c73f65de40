#!/bin/bash
# torch.save writes uint16 tensors in the format before zip archives, and torch.load cannot read them.
#
# Package: torch 2.13.0.
# Behaviour: torch.save(..., _use_new_zipfile_serialization=False) writes uint16 and uint32 tensors without complaint. Reading
# the file fails in torch.load, whether weights_only is True or False, with an AttributeError about storages: the file
# names an untyped storage, and the reader asks it for a type. int16 and uint8 are read in both ways, and so is uint16 in
# the format of today. Files of codebooks and tokens are where these types are met.
# Output seen: int16 True True, uint8 True True, uint16 AttributeError AttributeError, uint32 AttributeError
# AttributeError, uint16 as an archive True True
# Exit status: 0 if the behaviour is as described, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/env/bin/python" - "$folder/values.pt" <<'PY'
import sys

import torch



def read(name, is_archive):
    """Write four values, and return what reading them gives, first without and then with weights_only."""
    values = torch.arange(4).to(getattr(torch, name))
    torch.save(values, sys.argv[1], _use_new_zipfile_serialization=is_archive)
    seen = []
    for weights_only in (False, True):
        try:
            seen.append(str(torch.load(sys.argv[1], weights_only=weights_only).tolist() == [0, 1, 2, 3]))
        except Exception as error:
            seen.append(type(error).__name__)
    return " ".join(seen)


cases = [("int16", False), ("uint8", False), ("uint16", False), ("uint32", False), ("uint16", True)]
found = [f"{name}{' as an archive' if is_archive else ''} {read(name, is_archive)}" for name, is_archive in cases]
print(", ".join(found))
failed = ["Error" in text for text in found]
sys.exit(failed != [False, False, True, True, False])
PY
