"""Texts on which tokenizer libraries are likely to disagree: each kind that is known to have parted two of them."""

_ENGLISH = "I'm you're we've he'll she'd it's DON'T WE'RE I'VE 'tis ''s '''ll o'clock 's't're"
_SCRIPTS = (
    "Žluťoučký kůň Ünïcôdé ﬁ ĳ ǅ ß ẞ İi ıI",
    "Съешь ещё этих булок",
    "Ξεσκεπάζω τὴν ψυχοφθόρα",
    "دِيبَاجَة ١٢٣ هذا نصّ",
    "שָׁלוֹם עולם",
    "हिन्दी में क्षत्रिय १२३",
    "ภาษาไทยไม่มีช่องว่าง",
    "日本語のテキスト、カタカナ・ｶﾀｶﾅ。",
    "我爱人工智能，也爱自然语言处理。𠀀𪜀",
    "한국어 텍스트 ᄒ\u1161ᆫ",
    "ქართული ენა Ქ",
    "தமிழ் மொழி",
    "አማርኛ ᏣᎳᎩ ꭰ",
)
_NUMBERS = (
    "0 12 123 1234 12345678901234567890 3.14 1,000 ٣٤٥ ४५६ ੧੨ ๑๒๓ 一二三 ½ ² ₃ Ⅻ ⑳ 𝟘𝟙 1a2b3",
    "x1 y22z 4x4 10^-3 0xDEADBEEF",
)
_SPACES = (
    " ",
    "  ",
    "   a",
    "a   ",
    "a    b",
    "\n",
    "\n\n \n",
    "\r\n\r\n",
    " \r\n \t\v\f x",
    "\ta\t\tb",
    "a \n b\n  c\n\n\nd \n",
    "\u00a0a\u00a0 \u2003b\u3000c\u2028d\u2029e\u0085f\u200bg\ufeffh\u180ei\u202fj",
)
_CHARACTERS = (
    "a",
    "é",
    "漢",
    "🙂",
    "\x00",
    "".join(map(chr, range(32))) + "\x7f" + "".join(map(chr, range(0x80, 0xA0))),
    "a\x00b\x1bc\x7f d\x00\x00",
    "e\u0301 a\u0300\u0301\u0302b \u0301 \u0301\u0302x n\u0303o",
    "👩‍👩‍👧‍👦 👍🏽 🇩🇪🇫🇷 ❤️ 1️⃣ #️⃣ 🏴\U000e0067\U000e0062\U000e007f",
    "\ufffd\ufffd a\ufffdb",
    b"\xff\xfe\x80abc\xc3(\xe2\x82 \xf0\x9f\x92".decode("utf-8", "replace"),
    "\ue000\uf8ff\U000f0000\U0010ffff\ufdd0\uffff",
    "\u202eright to left\u202c \u200fx\u200e \u00ad",
    "\u0870 \U00010570 \U00011f04 \U0001e4d0 \U00031350 \U0002ebf0",  # letters of Unicode 14 to 15.1
    "\u1c89 \ua7cb \U000105c0 \U00010d40 \U00010d4a \U00016d43 \U0001e5d0",  # letters and digits of Unicode 16
    "'ſ ’s 'Ｓ ʼs `s",
)
_CODE = (
    "def f(x):\n    return {'a': [1, 2.5e-3], **x}  # ok\n\n\n\tif (a&&b||!c) { i++; }\r\n",
    '<a href="x?y=1&z=%20">&amp;</a> $foo->{bar}[0] =~ s/\\w+/$1/g; C:\\dir\\file ~/.x @a #b !!! ... ---- ==== ////',
)
_LONG = (
    "a" * 3000,
    " " * 3000,
    "\n" * 3000,
    "=" * 3000,
    "7" * 3000,
    "漢" * 1000,
    "ab" * 1500,
    "🙂" * 500,
    "\u0301" * 999,
)
HOSTILE = ("", _ENGLISH, *_SCRIPTS, *_NUMBERS, *_SPACES, *_CHARACTERS, *_CODE, *_LONG)
