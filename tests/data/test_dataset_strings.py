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
    (parsed,) = parse_dataset_str(text)
    assert (parsed.name, parsed.options, parsed.weight, parsed.text) == (name, options, None, text.strip())


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("A+B", [("A", {}, None, "A"), ("B", {}, None, "B")]),
        ("0.7*A:x=1+0.3*B:x=2", [("A", {"x": "1"}, 0.7, "A:x=1"), ("B", {"x": "2"}, 0.3, "B:x=2")]),
        (" 3 * A : x = 1 + 1 * B ", [("A", {"x": "1"}, 3, "A : x = 1"), ("B", {}, 1, "B")]),
        (
            "A:x='1+2':y=3+B+A:x=''",
            [
                ("A", {"x": "1+2", "y": "3"}, None, "A:x='1+2':y=3"),
                ("B", {}, None, "B"),
                ("A", {"x": ""}, None, "A:x=''"),
            ],
        ),
        ("1e-2*A", [("A", {}, 0.01, "A")]),
    ],
)
def test_a_mixture_is_taken_apart(text, parts):
    assert [(part.name, part.options, part.weight, part.text) for part in parse_dataset_str(text)] == parts


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
        ("A:x=1+y=2", "'y=2' behind a plus is no name of a dataset; put a value that holds a plus in single quotes"),
        ("A+", "has a plus with nothing on one side; put a value that holds a plus in single quotes"),
        ("+A", "has a plus with nothing on one side; put a value that holds a plus in single quotes"),
        ("A:x='1'++B", "has a plus with nothing on one side; put a value that holds a plus in single quotes"),
        ("0.7*A+B", "gives a weight to some parts only; give one to each, or to none"),
        ("half*A+B", "the weight 'half' must be a number above 0"),
        ("0*A+1*B", "the weight '0' must be a number above 0"),
        ("nan*A+1*B", "the weight 'nan' must be a number above 0"),
        ("*A", "the weight '' must be a number above 0"),
        ("A:x+B", "'x' is not key=value; put a value that holds a colon in single quotes"),
    ],
)
def test_a_malformed_string_is_named(text, sentence):
    with pytest.raises(ConfigError) as error:
        parse_dataset_str(text)
    assert sentence in str(error.value)
