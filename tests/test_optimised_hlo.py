"""Reading optimised HLO, on a program written out here."""

from scripts.optimised_hlo import OptimisedHlo, call_commands, step_commands

TEXT = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%fused_add (param_0: f32[4,8], param_1: f32[4,8]) -> (f32[4,8], bf16[2]) {
  %param_0 = f32[4,8]{1,0} parameter(0)
  %param_1 = f32[4,8]{1,0} parameter(1)
  ROOT %tuple.1 = (f32[4,8]{1,0}, bf16[2]{0}) tuple(%param_0, %param_1)
}

%fused_update (param_0: f32[100,8], param_1: f32[1,8]) -> f32[100,8] {
  %param_0 = f32[100,8]{1,0} parameter(0)
  %param_1 = f32[1,8]{1,0} parameter(1)
  ROOT %dynamic-update-slice.1 = f32[100,8]{1,0} dynamic-update-slice(%param_0, %param_1, %param_1)
}

%fused_call (param_0: f32[100,8]) -> f32[100,8] {
  %param_0 = f32[100,8]{1,0} parameter(0)
  ROOT %call.1 = f32[100,8]{1,0} custom-call(%param_0), custom_call_target="triton_kernel_call_ffi"
}

%body (arg: (s32[], f32[100,8])) -> (s32[], f32[100,8]) {
  %arg = (s32[], f32[100,8]{1,0}) parameter(0)
  %pool = f32[100,8]{1,0} get-tuple-element(%arg), index=1
  %fusion.1 = (f32[4,8]{1,0}, /*index=1*/bf16[2]{0}) fusion(%pool, %pool), kind=kLoop, calls=%fused_add
  %fusion.2 = f32[100,8]{1,0} fusion(%pool, %fusion.1), kind=kLoop, calls=%fused_update
  %fusion.3 = f32[100,8]{1,0} fusion(%fusion.2), kind=kCustom, calls=%fused_call
  %kernel.1 = (f32[100,8]{1,0}, f32[3]{0}) custom-call(%fusion.3), custom_call_target="mosaic_gpu_v2"
  %kernel.2 = f32[4,8]{1,0} custom-call(%kernel.1), custom_call_target="__cublas$lt$matmul"
  ROOT %tuple.2 = (s32[], f32[100,8]{1,0}) tuple(%kernel.1, %fusion.3)
}

%condition (arg: (s32[], f32[100,8])) -> pred[] {
  %arg = (s32[], f32[100,8]{1,0}) parameter(0)
  ROOT %compare.1 = pred[] compare(%arg, %arg), direction=LT
}

ENTRY %main (p0: f32[100,8]) -> f32[100,8] {
  %p0 = f32[100,8]{1,0} parameter(0)
  %copy.1 = s32[] copy(%p0)
  %while.1 = (s32[], f32[100,8]{1,0}) while(%p0), condition=%condition, body=%body
  ROOT %copy.2 = f32[100,8]{1,0} copy(%while.1)
}
"""


def test_kernels_are_counted_by_origin() -> None:
    hlo = OptimisedHlo(TEXT)
    assert hlo.entry == "main" and hlo.step() == "body"
    assert hlo.kinds("body") == {"fusion": 2, "triton": 1, "mosaic": 1, "matmul": 1}
    assert hlo.kinds("main") == {"copy": 2, "while": 1}


def test_a_branch_is_no_step() -> None:
    """However much it does: a step chooses between branches."""
    call = 'custom-call(%arg), custom_call_target="triton_kernel_call_ffi"'
    branch = "%branch (arg: f32[100,8]) -> f32[100,8] {\n" + f"  %call.2 = f32[100,8]{{1,0}} {call}\n" * 3 + "}\n\n"
    choice = "  %choice = f32[100,8]{1,0} conditional(%pool, %pool), branch_computations={%branch, %branch}\n"
    text = TEXT.replace("  %kernel.1 =", choice + "  %kernel.1 =").replace("ENTRY", branch + "ENTRY")
    hlo = OptimisedHlo(text)
    assert hlo.step() == "body"
    assert hlo.kinds("branch") == {"triton": 3} and hlo.kinds("body")["conditional"] == 1


def test_what_is_written_in_place_or_by_kernels_is_no_copy() -> None:
    copied = OptimisedHlo(TEXT).copied()
    assert {text.split()[0 if text[0] == "%" else 1]: size for text, size in copied.items()} == {
        "%copy.1": 4,
        "%copy.2": 3200,
        "%fusion.1": 4 * 8 * 4 + 2 * 2,
    }


def test_commands_are_those_of_the_loop_body() -> None:
    thunks = """\
000: kCommandBuffer [source       | next=009 (1)]
    001: kCopy         [source | sink] kCopy
009: kWhile         [prev=000 (1) | sink        ]
condition:
    010: kCustomKernel [source | sink] loop_compare_fusion
  body:
    000: kCommandBuffer [source | sink]
        011: kCustomKernel   [source       | next=028 (17)] input_reduce_fusion
    151: kConditional   [prev=000 (1) | next=000 (1)]
        056: kCopy [source | sink] kCopy
    000: kCommandBuffer [prev=151 (1) | sink        ]
"""
    assert step_commands(thunks) == {"CommandBuffer": 2, "Conditional": 1}
    assert call_commands(thunks) == {"CommandBuffer": 1, "While": 1}
    assert step_commands("000: kCopy [sink]\n001: kCustomCall [sink]\n    002: kCopy [sink]") == {
        "Copy": 1,
        "CustomCall": 1,
    }


def test_a_loop_inside_a_command_buffer_is_not_the_hosts() -> None:
    thunks = """\
000: kCommandBuffer [source | sink]
    001: kWhile         [source | sink]
condition:
        002: kCustomKernel [source | sink] wrapped_compare
      body:
        003: kCustomKernel   [source       | next=004 (1)] input_reduce_fusion
"""
    assert step_commands(thunks) == call_commands(thunks) == {"CommandBuffer": 1}
