"""A digest in each JSON file that is read back: what was altered is noticed."""

import json

import pytest

from spat_train.errors import InputError
from spat_train.runtime import json_files
from tests.helpers import edit_json

CONTENT = {"eps": 8 / 255, "name": "a ü", "lists": [[1, 2.5e-300], (), {"digest": None}], "no": None, "yes": True, "of": {"1": 2}}
ALTERED = r'it was altered since it was written \(its digest differs\): restore it, or, .* remove "digest" from it'


def test_a_flipped_bit_is_noticed(tmp_path):
    """Wherever it is: what is read is what was written, or nothing."""
    file, written = tmp_path / "a.json", json_files.to_bytes(CONTENT)
    expected = json.loads(json.dumps(CONTENT))
    read = 0
    for at in range(len(written)):
        file.write_bytes(written[:at] + bytes([written[at] ^ 1 << at % 8]) + written[at + 1 :])
        try:
            found = json_files.read(file)
        except InputError as error:
            assert str(file) in str(error)
        else:
            others = found.keys() - expected.keys()  # the name of the digest itself
            assert {name: value for name, value in found.items() if name not in others} == expected
            assert len(others) <= 1
            read += 1
    assert 0 < read < len(written)  # spaces, and that name


def test_layout_and_order_do_not_matter(tmp_path):
    file, expected = tmp_path / "a.json", json.loads(json.dumps(CONTENT))
    content = json.loads(json_files.to_bytes(CONTENT))
    file.write_text(json.dumps(dict(reversed(content.items())), ensure_ascii=False))
    assert json_files.read(file) == expected
    edit_json(file, eps=1)  # without its digest, as in files of earlier versions
    assert json_files.read(file) == expected | {"eps": 1}
    file.write_text(json.dumps(content | {"eps": 1}))
    with pytest.raises(InputError, match=ALTERED):
        json_files.read(file)
