//! Plain loops compiled for each instruction set, chosen at run time: for kernels that the compiler
//! vectorises well. Those it does not are written over the vectors of [`super::simd`].

/// `a * b + c`, fused where the instruction set has it (a library call elsewhere would be slow).
#[inline(always)]
pub(super) fn mul_add<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// Defines functions whose bodies, plain loops that the compiler vectorises, are compiled for every
/// [`Level`](super::simd::Level). Inside, the constant `FMA` says whether fused multiply-add is an instruction.
macro_rules! multiversion {
    ($($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block)+) => {
        $(
            $(#[$doc])*
            $vis fn $name($($arg: $ty),*) $(-> $ret)? {
                #[inline(always)]
                #[allow(clippy::extra_unused_type_parameters, clippy::too_many_arguments)]
                fn body<const FMA: bool>($($arg: $ty),*) $(-> $ret)? $body

                #[cfg(target_arch = "x86_64")]
                #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
                #[allow(clippy::too_many_arguments)]
                fn avx512($($arg: $ty),*) $(-> $ret)? { body::<true>($($arg),*) }

                #[cfg(target_arch = "x86_64")]
                #[target_feature(enable = "avx2,fma,f16c")]
                #[allow(clippy::too_many_arguments)]
                fn avx2($($arg: $ty),*) $(-> $ret)? { body::<true>($($arg),*) }

                match $crate::kernels::simd::Level::best() {
                    // SAFETY: the level was detected on this processor.
                    #[cfg(target_arch = "x86_64")]
                    $crate::kernels::simd::Level::Avx512 | $crate::kernels::simd::Level::Vnni => unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    #[cfg(target_arch = "x86_64")]
                    $crate::kernels::simd::Level::Avx2 => unsafe { avx2($($arg),*) },
                    _ => body::<{ cfg!(target_arch = "aarch64") }>($($arg),*),
                }
            }
        )+
    };
}
pub(super) use multiversion;
