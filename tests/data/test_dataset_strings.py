import pytest

from dinov2.data.dataset_strings import parse_dataset_str
from dinov2.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("Digits", "Digits", {}),
        ("ImageFolder:root=photos", "ImageFolder", {"root": "photos"}),
        ("ImageFolder:root=a b/c.d:split=TRAIN", "ImageFolder", {"root": "a b/c.d", "split": "TRAIN"}),
        ("ImageFolder:root='C:/photos+more':split=val", "ImageFolder", {"root": "C:/photos+more", "split": "val"}),
        ("ImageFolder:root='it''s':split=val", "ImageFolder", {"root": "it's", "split": "val"}),
        ("ImageFolder:root=it's", "ImageFolder", {"root": "it's"}),
        (" ImageFolder : root = photos ", "ImageFolder", {"root": "photos"}),
        ("A:q=a=b", "A", {"q": "a=b"}),
        ("A:q=", "A", {"q": ""}),
        ("A:q='':r=1", "A", {"q": "", "r": "1"}),
        ("package.module.Class:x=1", "package.module.Class", {"x": "1"}),
    ],
)
def test_a_string_is_taken_apart(text, name, options):
    parsed = parse_dataset_str(text)
    assert (parsed.name, parsed.options) == (name, options)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "the dataset string is empty; give one such as ImageFolder:root=photos"),
        ("root=photos", "'root=photos' does not start with a name; write it as ImageFolder:root=photos"),
        ("A:root='x", "the single quote after root= is not closed"),
        ("A:root='x'y", "the single quote after root= is not closed"),
        ("A:root=C:/x", "'/x' is not key=value; put a value that holds a colon in single quotes"),
        ("A:x=1:x=2", "gives x twice"),
        ("A:", "ends in a colon without a key=value behind it"),
        ("0.7*A:x=1+0.3*B:x=2", "mixtures are not supported; put a value that holds a plus in single quotes"),
        ("A:x=1+2", "mixtures are not supported; put a value that holds a plus in single quotes"),
    ],
)
def test_a_malformed_string_is_named(text, sentence):
    with pytest.raises(ConfigError) as error:
        parse_dataset_str(text)
    assert sentence in str(error.value)
