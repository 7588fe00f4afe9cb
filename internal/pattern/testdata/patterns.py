"""Writes patterns.json: what Python's own fnmatchcase says of patterns and names.

Run: python3 -W ignore patterns.py > patterns.json (3.10 and older refuse some).
One line a pattern: [pattern, [names that match], [names that do not]].
"""
import fnmatch
import json
import random

random.seed(5)
PATTERNS = [
    "*.safetensors", "sub/*", "[a-c]*", "[!a]*", "[]a]", "[!]a]", "[a", "[", "[]", "[!]", "[!", "[a-]", "[-a]",
    "[c-a]", "[!c-a]", "[b-a!]", "[b-a!c]", "[b-a!-c]", "[a-b-c]", "[^a]", "[\\]", "[a\\-c]", "[--a]", "[!--a]",
    "a\\*", "**", "?", "??*", "*/", "[a-c-]", "[b-aa-c]", "[[a]", "[a[]", "[a&&b]", "[a~~b]", "[a||b]", "[.-/]*",
    "日?", "[ä-ü]", "*a*b*c", "onnx/*.onnx", "*.[ps]*",
]
NAMES = [
    "", "a", "b", "c", "-", "]", "!", "^", "[", "\\", "/", "a/b", "a.b", "ab", "a]", "[a", "&", "~", "|", "日本", "ö",
    "sub/x", "x.safetensors", "sub/x.safetensors", "X.SAFETENSORS", "a\nb", "\n", "[]", "[!]", "[!", "z", ".", "a\\*",
    "a-c", "onnx/model.onnx", "onnx/sub/model.onnx", "aXbXcX", "aXbXc", "m.pt", "m.bin",
]
pick = lambda chars, low, high: "".join(random.choice(chars) for _ in range(random.randint(low, high)))
for pattern in PATTERNS + [pick("ab-]![^*?/\\.c", 2, 9) for _ in range(100)]:
    names = sorted(set(NAMES + [pick("ab-]![^/\\.c", 0, 4) for _ in range(10)]))
    yes = [n for n in names if fnmatch.fnmatchcase(n, pattern)]
    print(json.dumps([pattern, yes, [n for n in names if n not in yes]], ensure_ascii=False))
