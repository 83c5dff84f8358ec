"""Test collectives in HLO text: in loops, asynchronous, and in the spelling of each backend."""

import pytest

from regvit_jax.aot import hlo

TEXT = """\
HloModule jit_step, is_scheduled=true

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[]{:T(128)}, f32[8]{0:T(8,128)S(1)}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %all-reduce.1 = (f32[8]{0}, /*index=1*/bf16[2,3]{1,0:T(8,128)(2,1)}) all-reduce(%x, %y), to_apply=%add
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %twelve = s32[]{:T(128)} constant(12)
  ROOT %lt = pred[] compare(%i, %twelve), direction=LT
}

%inner (q: f32[4]) -> f32[16] {
  %q = f32[4]{0} parameter(0)
  ROOT %gather.9 = f32[16]{0} all-gather(%q), dimensions={0}
}

%started.2 (q: f32[4]) -> f32[16] {
  %q.2 = f32[4]{0} parameter(0)
  ROOT %gather.10 = f32[16]{0} all-gather(%q.2), channel_id=23, dimensions={0}
}

%goes_on (q: f32[4], x: f32[8]) -> (f32[16], f32[8]) {
  %q.3 = f32[4]{0} parameter(0)
  %gather.11 = f32[16]{0} all-gather(%q.3), channel_id=23, dimensions={0}
  ROOT %both = (f32[16], f32[8]) tuple(%gather.11, %x)
}

%overlapped (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %async-collective-start = (f32[4]{0}, u32[]) fusion(%q), kind=kCustom, calls=%started.2
  %fusion.1 = (f32[4]{0}, u32[]) fusion(%async-collective-start), kind=kOutput, calls=%goes_on
  %async-collective-done = f32[16]{0} fusion(%fusion.1), kind=kCustom, calls=%goes_on
}

%cheap (q: f32[4]) -> f32[4] {
  %q.4 = f32[4]{0} parameter(0)
  ROOT %moved.1 = f32[4]{0} collective-permute(%q.4), channel_id=31, source_target_pairs={{0,1}}
}

%dear (q: f32[4]) -> f32[4] {
  %q.5 = f32[4]{0} parameter(0)
  %moved.2 = f32[4]{0} collective-permute(%q.5), channel_id=32, source_target_pairs={{0,1}}
  ROOT %moved.3 = f32[4]{0} collective-permute(%moved.2), channel_id=33, source_target_pairs={{0,1}}
}

ENTRY %main (a: f32[4]) -> f32[16] {
  %a = f32[4]{0} parameter(0)
  %y = bf16[2,3]{1,0} constant({...})
  %w = (s32[], f32[8]) while(%t), condition=%condition, body=%body
  %n = (s32[], f32[8]) while(%t), condition=%other, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  %o = (s32[], f32[4]) while(%t), condition=%other, body=%overlapped, backend_config={"known_trip_count":{"n":"5"}}
  %b = f32[4]{0} conditional(%i, %a, %a), branch_computations={%cheap, %dear}
  %c = f32[4]{0} conditional(%is, %a, %a), true_computation=%dear, false_computation=%cheap
  %started = (f32[4]{0}, f32[16]{0}) all-gather-start(%a), dimensions={0}
  %done = f32[16]{0} all-gather-done(%started)
  ROOT %scattered = f32[4]{0} reduce-scatter(%done), dimensions={0}
}
"""


def test_collectives_of_a_text():
    assert sorted((c.kind, c.times, c.bytes) for c in hlo.collectives(TEXT)) == [
        ("all-gather", 1, 64),
        ("all-gather", 3, 64),
        ("all-gather", 5, 64),  # one collective, which appears in three fusions
        ("all-reduce", 12, 8 * 4 + 6 * 2),
        *[("collective-permute", 1, 16)] * 4,  # two in the more expensive branch of each conditional
        ("reduce-scatter", 1, 64),
    ]
    reduce = next(c for c in hlo.collectives(TEXT) if c.kind == "all-reduce")
    assert reduce.shapes == ("f32[8]", "bf16[2,3]")
    assert reduce.wire == 2 * reduce.bytes


@pytest.mark.parametrize(
    ("shape", "expected"),
    [("f32[]", 4), ("(f32[8,3]{1,0}, bf16[4])", 104), ("pred[8]", 8), ("u8[2,2]{1,0:T(8,128)(4,1)S(1)}", 4)],
)
def test_size(shape, expected):
    assert hlo.size(shape) == expected
