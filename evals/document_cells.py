"""The tables of the source document (see docs/method.md), with its cells."""

from document import Table

_RANDOM = "the weights are random, and the document's seed is unknown"
_NO_TARGET = (
    "the document names neither the block nor the target output; here it is the output of the best "
    "token at this block"
)
_NO_STEP = "the document gives no step size, and the softmax needs a temperature that it lacks"
_SECOND_THOUSAND = (
    "called called called called called",
    "ItemItemItemItemItem",
    "urauraurauraura",
    "vecvecvecvecvec",
    "emeemeemeemeeme",
)
_THIRTEEN_AT_4 = ("tamb would си]{da", "column tamb mar marity", "cal would tambIONils")

TABLES: tuple[Table, ...] = (
    Table(
        "complete search",
        "complete",
        "[:, :, 0-3]",
        (1, 2, 4, 8, 12),
        {
            "gpt2": {
                1: ("Pwr", "Claud", "Peb", "View"),
                2: ("ItemTracker", "watched", "Peb", "(@"),
                4: ("ItemTracker", "watched", "Peb", "(@"),
                8: ("ItemTracker", "watched", "Peb", "(@"),
            },
            "gpt2-medium": {
                1: ("Ender", "pmwiki", "Cass", "catentry"),
                4: ("refres", "Flavoring", "carbohyd", "assetsadobe"),
                8: ("refres", "Flavoring", "carbohyd", "assetsadobe"),
                12: ("refres", "Flavoring", "carbohyd", "assetsadobe"),
            },
        },
    ),
    Table(
        "inversion, L1",
        "L1 inversion",
        "[:, :, 0-3]",
        (1,),
        {"gpt2": {1: ("for", "im", "G", "$")}},
        excuse=_NO_TARGET,
    ),
    Table(
        "inversion, cosine",
        "cosine inversion",
        "[:, :, 0-3]",
        (1,),
        {"gpt2": {1: ("!", '"', "qu", "$")}},
        excuse=_NO_TARGET,
    ),
    Table(
        "softmax prior",
        "softmax prior",
        "[:, :, 0-3]",
        (1, 4, 8),
        {
            "gpt2": {
                1: ("cris", "Cola", "Cass", "Holt"),
                4: ("Geh", "20439", "og"),
                8: ("Geh", "20439", "expend", "assetsadobe"),
            }
        },
        excuse=_NO_STEP,
    ),
    Table(
        "greedy search",
        "greedy",
        "[:, :, 0-3]",
        (1, 4, 8, 12, 16, 20, 24),
        {
            "gpt2": {
                1: (
                    " Pwr PwrItemTrackerItemTracker",
                    " Claud Lara Lara Lara",
                    " Peb Peb Peb Peb",
                    "Viewtnctnctnc",
                ),
                4: (
                    "ItemTracker interf interfItemTracker",
                    "watched watched watched watched",
                    "Peb Peb Peb Peb",
                    ' (@"></ guiName"></',
                ),
                8: (
                    "ItemTracker interf interf interf",
                    "watched watched watched watched",
                    " Peb Peb Peb Peb",
                    '(@ guiName"></ guiName',
                ),
                12: (
                    "ItemTracker interf interf interf",
                    " hostages herpes herpes herpes",
                    " Kenn Peb Peb Peb",
                    "(@" + "rawdownloadcloneembedreportprint" * 3,
                ),
            },
            "llama-7b": {
                1: (
                    "Hein Hein mang Hein",
                    "cyl szere Woj cyl",
                    "inf inf char inf",
                    "travers travers assim feb",
                ),
                4: (
                    "</s></s>",
                    "cylнциклоuvud Externe",
                    "character postgresql mysqliAppData",
                    "</s>Q</s>l",
                ),
                8: ("</s></s>", "cyllista Which Peru", "</s></s></s></s>", "</s>Q</s>Q"),
                12: ("</s></s>", "cyl которой|чення", "characterparameters\\ \\", "</s>武²)."),
                16: (
                    "1!--puésugo",
                    " dataframe Broad Mediabestanden",
                    "</s> rép оп нап",
                    "</s>武性ktiv",
                ),
                20: (
                    "</s> thor webpack winter",
                    " Cés That roughly",
                    " .= Repub",
                    "� traject traject traject",
                ),
                24: ("</s>CURCURCUR", "aussianclar circuit", "</s> rép оп §", "1) traject/"),
            },
        },
    ),
    Table(
        "gradient, first neurons",
        "gradient",
        "[:, :, 0-2]",
        (1,),
        {"llama-7b": {1: (None, None, None)}},
    ),
    Table(
        "gradient, single neurons",
        "gradient",
        "[:, :, {0}-{4}]",
        (1, 4, 8),
        {
            "llama-7b": dict.fromkeys((1, 4, 8), _SECOND_THOUSAND),
            "llama-13b": {1: _SECOND_THOUSAND},
            "llama-30b": {1: _SECOND_THOUSAND},
        },
    ),
    Table(
        "gradient, deeper in 30b",
        "gradient",
        "[:, :, {0}-{2}]",
        (1, 4, 32),
        {
            "llama-30b": {
                1: _SECOND_THOUSAND[:3],
                4: _SECOND_THOUSAND[:3],
                32: (
                    "called planlearason current",
                    "******** doesn())ason current",
                    "ura statlearason current",
                ),
            }
        },
    ),
    Table(
        "gradient, one position at a time",
        "gradient",
        "[:, 0-4, {0}]",
        (1,),
        {
            "llama-7b": {
                1: (
                    "called Iger Alsolass",
                    "are calledger Alsolass",
                    "are I called Alsolass",
                    "are Iger calledlass",
                    "are Iger Also called",
                )
            }
        },
    ),
    Table(
        "gradient, first neurons combined",
        "gradient",
        "[:, :, 0:4]",
        (1,),
        {"llama-7b": {1: (None,)}},
    ),
    Table(
        "gradient, neurons combined",
        "gradient",
        "[:, :, {0}:{4}]",
        (1,),
        {"llama-7b": {1: ("vec calledura calledvec",)}},
    ),
    Table(
        "gradient, all neurons at one position",
        "gradient",
        "[:, 0-2, :]",
        (1, 4, 8, 12),
        {
            "llama-13b": {
                1: ("ther� year раreturn", "therige year раreturn", "ther� year раreturn"),
                4: _THIRTEEN_AT_4,
                8: ("ports mar mar user more", "endports marре user", "tamb marports Elie"),
                12: ("ports mar tamb El mar", "ports mar cды", "tamb marportsiche mar"),
            },
            "llama-30b": {4: ("osseringering How", "oss yearsering yearsoss", "estooss� yearsoss")},
        },
    ),
    Table(
        "gradient, isolated block",
        "isolated gradient",
        "[:, :, {0}-{3}]",
        (2, 4, 32),
        {"llama-13b": {32: _SECOND_THOUSAND[:4]}},
    ),
    Table(
        "untrained, complete search",
        "complete",
        "[:, :, 0-3]",
        (1, 4, 8, 12),
        {
            "gpt2": {
                1: ("Yan", "criticizing", "policy", "Pont"),
                4: ("inski", "Giants", "consuming", "Bert"),
                8: ("distruptions", "erie", "N", "Aut"),
                12: ("video", "collection", "wipe", "EngineDebug"),
            }
        },
        untrained=True,
        excuse=_RANDOM,
    ),
    Table(
        "untrained, greedy search",
        "greedy",
        "[:, :, 0-3]",
        (1, 4, 8),
        {
            "gpt2": {
                1: (
                    "Officers ii Denis variability",
                    "onductASE Media tissue",
                    " Comp accusationShiftShift",
                    " separated activekef patented",
                ),
                4: (
                    " Abortion contention variability variability",
                    ' one 185 (" Ic',
                    " coin Foss multiplied multiplied",
                    " Ae archetype faded faded",
                ),
                8: (
                    " Preferencesstrip Installation Installation",
                    " one logosAmy sheet",
                    "coin tiles unique backstory",
                    " active MDMA incentiv thirst",
                ),
            }
        },
        untrained=True,
        excuse=_RANDOM,
    ),
    Table(
        "untrained, gradient, first neurons",
        "gradient",
        "[:, :, 0-2]",
        (1,),
        {"llama-7b": {1: ("<unk><unk><unk><unk><unk>", "<s><s><s><s><s>", "</s></s></s></s></s>")}},
        untrained=True,
    ),
    Table(
        "untrained, gradient, single neurons",
        "gradient",
        "[:, :, {0}-{4}]",
        (1,),
        {"llama-7b": {1: _SECOND_THOUSAND}},
        untrained=True,
    ),
    Table(
        "untrained, gradient, one position at a time",
        "gradient",
        "[:, 0-4, {0}]",
        (1,),
        {
            "llama-7b": {
                1: (
                    "calledremger partlass",
                    "are calleddata Alsolass",
                    "are I calledamplelass",
                    "are Idata calledlass",
                    "are Idataample called",
                )
            }
        },
        untrained=True,
    ),
    Table(
        "untrained, gradient, deeper",
        "gradient",
        "[:, :, {0}-{3}]",
        (4,),
        {
            "llama-7b": {
                4: (
                    "are calleddata called met",
                    "Item larItemItem met",
                    "uraFieldurauraura",
                    "vecvecvec reallypha",
                )
            }
        },
        untrained=True,
    ),
    Table(
        "untrained, gradient, all neurons at one position",
        "gradient",
        "[:, 0-2, :]",
        (4,),
        {"llama-7b": {4: ("ypearchárodyause", "ci helriesiти", "haromenIndoz és")}},
        untrained=True,
    ),
)
"""All tables, the untrained controls last. (The document's title of the single positions of the
untrained 7b has `0-2`; the table shows five.)
"""
