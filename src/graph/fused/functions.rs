//! The functions of fused kernels, written so that the compiler makes vectors of them: no branches, no tables, no
//! calls.
//!
//! Those of `f32` are computed in `f64` and rounded once, but for `exp`, `erf` and the share of a normal distribution
//! that GELU has, of which there are most: they are made of multiply-adds that are rounded once, wherever these are
//! written so and nowhere else, so that a result has the same bits whatever vectors the processor has. (One without
//! such an instruction has it from a function of the C library, which takes long; `gemm` has no vectors for it either.)
//! Errors against the exact value, over all of `f32` ([tests](self#tests)), in units in the last place: `exp` 0.87, and
//! 0.76 where that is no normal number any more, `erf` 0.98, `log`, `log1p` and `tanh` 0.51; burn's own (the C
//! library's, and `libm`'s `erff`) are within 1. Twice the share of a normal distribution is within 1.09 times 2^-23,
//! where `1 + erf` is within 1.15. Those of `f64` are burn's.

/// An element that kernels compute with.
pub(super) trait Float: Copy + Default + PartialOrd + Send + Sync + 'static {
    fn from_f64(value: f64) -> Self;
    fn to_f64(self) -> f64;
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    fn div(self, other: Self) -> Self;
    fn neg(self) -> Self;
    fn abs(self) -> Self;
    fn sqrt(self) -> Self;
    fn powf(self, exponent: Self) -> Self;
    fn exp(self) -> Self;
    fn log(self) -> Self;
    fn log1p(self) -> Self;
    fn tanh(self) -> Self;
    /// Of `f32` only, as the next: no kernel asks for that of another.
    fn erf(self) -> Self;
    /// Twice the share of a normal distribution that lies below.
    fn twice_normal(self) -> Self;

    #[inline(always)]
    fn is_nan(self) -> bool {
        self.partial_cmp(&self).is_none()
    }
}

macro_rules! arithmetic {
    ($float:ty) => {
        #[inline(always)]
        fn from_f64(value: f64) -> Self {
            value as $float
        }
        #[inline(always)]
        fn to_f64(self) -> f64 {
            self.into()
        }
        #[inline(always)]
        fn add(self, other: Self) -> Self {
            self + other
        }
        #[inline(always)]
        fn sub(self, other: Self) -> Self {
            self - other
        }
        #[inline(always)]
        fn mul(self, other: Self) -> Self {
            self * other
        }
        #[inline(always)]
        fn div(self, other: Self) -> Self {
            self / other
        }
        #[inline(always)]
        fn neg(self) -> Self {
            -self
        }
        #[inline(always)]
        fn abs(self) -> Self {
            <$float>::abs(self)
        }
        #[inline(always)]
        fn sqrt(self) -> Self {
            <$float>::sqrt(self)
        }
        #[inline(always)]
        fn powf(self, exponent: Self) -> Self {
            <$float>::powf(self, exponent)
        }
    };
}

impl Float for f32 {
    arithmetic!(f32);

    #[inline(always)]
    fn exp(self) -> Self {
        // From here on it is 0; then nothing so small need be computed, which takes long.
        let vanishes = self < -104.0;
        let x = if vanishes { 0.0 } else { self };
        let x = if x > 89.0 { 89.0 } else { x };
        let WithoutDoublings { shifted, r, rest } = WithoutDoublings::of(x);
        // Less 1, which is added last.
        let p = r + (r * r).mul_add(over_square(r), rest);
        // Powers of two by their exponents: two, since one may be none that an `f32` holds.
        let n = shifted.to_bits() << 23;
        let half = shifted.to_bits() >> 1 << 23;
        let y = times(half, p) * power(n.wrapping_sub(half));
        if vanishes { 0.0 } else { y }
    }

    #[inline(always)]
    fn log(self) -> Self {
        log(self.into()) as f32
    }

    #[inline(always)]
    fn log1p(self) -> Self {
        let x = f64::from(self);
        // `1 + x` loses the last bits of a small `x`.
        let small = x * (1.0 - x * (0.5 - x * (1.0 / 3.0)));
        (if x.abs() < 1.0 / 4096.0 { small } else { log(1.0 + x) }) as f32
    }

    #[inline(always)]
    fn tanh(self) -> Self {
        let x = f64::from(self);
        let large = 1.0 - 2.0 / (exp(2.0 * x) + 1.0);
        // Where the difference loses bits.
        let z = x * x;
        let small = x * (1.0 - z * (1.0 / 3.0 - z * (2.0 / 15.0 - z * (17.0 / 315.0))));
        (if x.abs() < 1.0 / 16.0 { small } else { large }) as f32
    }

    #[inline(always)]
    fn erf(self) -> Self {
        // A polynomial near 0; else 1 less the exponential of one, which from 4 on changes no bit of 1.
        let z = self * self;
        let p = z.mul_add(-5.967_617e-4, 4.991_194_2e-3);
        let p = z.mul_add(p, -2.676_813_5e-2);
        let p = z.mul_add(z.mul_add(p, 1.128_199_25e-1), -3.761_253_4e-1);
        let small = self.mul_add(z.mul_add(p, 1.283_791_7e-1), self);
        let x = self.abs();
        let x = if x > 4.0 { 4.0 } else { x };
        let p = x.mul_add(-1.728_534_7e-5, 3.831_971_3e-4);
        let p = (x * x).mul_add(p, x.mul_add(-3.883_964_4e-3, 2.425_462_2e-2));
        let p = x.mul_add(x.mul_add(p, -1.067_778_8e-1), -6.348_467e-1);
        let WithoutDoublings { shifted, r, .. } = WithoutDoublings::of(x.mul_add(x.mul_add(p, -1.287_175_1e-1), -x));
        let scale = power(shifted.to_bits() << 23);
        let above = 1.0 - scale;
        let large = scale.mul_add(-(r * r).mul_add(over_square(r), r), above).copysign(self);
        if self.abs() > 0.921_875 { large } else { small }
    }

    #[inline(always)]
    fn twice_normal(self) -> Self {
        // The exponential of a polynomial for what lies beyond `|x|`, which from 6 on changes no bit of 2.
        let x = self.abs();
        let x = if x > 6.0 { 6.0 } else { x };
        let p = x.mul_add(1.965_007_6e-6, -2.729_447_4e-5);
        let p = x.mul_add(x.mul_add(p, 1.290_499_8e-4), 9.491_791e-5);
        let p = x.mul_add(x.mul_add(p, -4.895_990_7e-3), 3.638_757_8e-2);
        let p = x.mul_add(x.mul_add(p, 3.182_988_8e-1), 7.978_853e-1);
        let WithoutDoublings { shifted, r, .. } = WithoutDoublings::of(-x * p);
        let scale = power(shifted.to_bits() << 23);
        let (below, by) = if self < 0.0 { (scale, scale) } else { (2.0 - scale, -scale) };
        let y = by.mul_add((r * r).mul_add(over_square(r), r), below);
        if self < -6.0 { 0.0 } else { y }
    }
}

impl Float for f64 {
    arithmetic!(f64);

    #[inline(always)]
    fn exp(self) -> Self {
        f64::exp(self)
    }

    #[inline(always)]
    fn log(self) -> Self {
        f64::ln(self)
    }

    #[inline(always)]
    fn log1p(self) -> Self {
        f64::ln_1p(self)
    }

    #[inline(always)]
    fn tanh(self) -> Self {
        f64::tanh(self)
    }

    fn erf(self) -> Self {
        unreachable!("burn computes the error function of f64")
    }

    fn twice_normal(self) -> Self {
        unreachable!("burn computes the error function of f64")
    }
}

/// What is left of an `f32` without its multiples of the logarithm of 2.
struct WithoutDoublings {
    /// The number of multiples, in the lowest bits.
    shifted: f32,
    r: f32,
    /// What rounding took off `r`.
    rest: f32,
}

impl WithoutDoublings {
    #[inline(always)]
    fn of(x: f32) -> Self {
        // Adding it leaves the nearest integer in the lowest bits.
        const ROUND: f32 = 12_582_912.0;
        // The logarithm of 2 in two parts, of which the first has so few bits that its multiples are exact.
        const HIGH: f32 = 355.0 / 512.0;
        const LOW: f32 = -2.121_944_4e-4;
        let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
        let n = shifted - ROUND;
        let near = n.mul_add(-HIGH, x);
        let r = n.mul_add(-LOW, near);
        Self { shifted, r, rest: n.mul_add(-LOW, near - r) }
    }
}

/// `(e^r - 1 - r) / r^2` for what is left of a number.
#[inline(always)]
fn over_square(r: f32) -> f32 {
    let p = r.mul_add(1.381_421_3e-3, 8.368_899e-3);
    let p = r.mul_add(p, 4.166_840_8e-2);
    r.mul_add(r.mul_add(p, 1.666_652e-1), 4.999_999_4e-1)
}

/// 2 to the power of a number that lies where an `f32` has its exponent.
#[inline(always)]
fn power(n: u32) -> f32 {
    f32::from_bits(n.wrapping_add(1.0f32.to_bits()))
}

/// That power times what is more than 1 by `p`.
#[inline(always)]
fn times(n: u32, p: f32) -> f32 {
    power(n).mul_add(p, power(n))
}

/// `e` to the power of an `f32`, within 2^-34 of its size; beyond what an `f32` holds, anything beyond that.
#[inline(always)]
fn exp(x: f64) -> f64 {
    // Adding it leaves the nearest integer in the lowest bits.
    const ROUND: f64 = 6_755_399_441_055_744.0;
    let x = if x > 180.0 { 180.0 } else { x };
    let x = if x < -180.0 { -180.0 } else { x };
    let shifted = x * std::f64::consts::LOG2_E + ROUND;
    let r = x - (shifted - ROUND) * std::f64::consts::LN_2;
    // Of all polynomials of its degree the one with the least relative error over half a doubling around 1.
    let p = 0.0013948195104249931 + r * 0.00019775152145461533;
    let p = 0.04166622525097521 + r * (0.00833356119445267 + r * p);
    let p = 0.5000000104597847 + r * (0.16666665125138191 + r * p);
    let p = 0.9999999999616528 + r * (1.0000000002432998 + r * p);
    // A power of two by its exponent.
    p * f64::from_bits(shifted.to_bits().wrapping_add(1023) << 52)
}

/// The natural logarithm of what is no subnormal `f64`.
#[inline(always)]
fn log(x: f64) -> f64 {
    const MANTISSA: u64 = (1 << 52) - 1;
    let bits = x.to_bits();
    // A mantissa from the root of one half on, and the power of two that goes with it.
    let above = (bits & MANTISSA) > (std::f64::consts::SQRT_2.to_bits() & MANTISSA);
    let m = f64::from_bits((bits & MANTISSA) | (if above { 1022 } else { 1023 } << 52));
    // An exponent as a number without a conversion: in the lowest bits of one that is large enough.
    const LARGE: u64 = 0x4330_0000_0000_0000;
    let exponent = f64::from_bits(LARGE | ((bits >> 52) + u64::from(above))) - (f64::from_bits(LARGE) + 1023.0);
    let s = (m - 1.0) / (m + 1.0);
    let z = s * s;
    let p = 1.0 / 9.0 + z * (1.0 / 11.0 + z * (1.0 / 13.0));
    let p = 1.0 / 3.0 + z * (1.0 / 5.0 + z * (1.0 / 7.0 + z * p));
    let y = exponent * std::f64::consts::LN_2 + 2.0 * (s + s * z * p);
    let y = if x == f64::INFINITY { x } else { y };
    let y = if x == 0.0 { f64::NEG_INFINITY } else { y };
    if x >= 0.0 { y } else { f64::NAN }
}

#[cfg(test)]
mod tests {
    use super::Float;

    /// The error of an `f32` in units in the last place of the exact value.
    fn error(exact: f64, found: f32) -> f64 {
        if exact.is_nan() || exact as f32 == found {
            return if exact.is_nan() == found.is_nan() { 0.5 } else { f64::INFINITY };
        }
        if !found.is_finite() {
            return f64::INFINITY;
        }
        let exponent = (exact.abs() as f32).max(f32::MIN_POSITIVE).to_bits() >> 23;
        (f64::from(found) - exact).abs() / 2f64.powi(exponent as i32 - 127 - 23)
    }

    /// The largest error over floats of all sizes, and over many of those that occur.
    fn worst(found: impl Fn(f32) -> f32, exact: impl Fn(f64) -> f64) -> f64 {
        let all = (0..=u32::MAX / 50_021).map(|n| f32::from_bits(n * 50_021));
        let usual = (-60_000..60_000).map(|n| n as f32 * 1.7e-3);
        let small = (-20_000..20_000).map(|n| n as f32 * 2.3e-5);
        all.chain(usual).chain(small).map(|x| error(exact(x.into()), found(x))).fold(0.0, f64::max)
    }

    /// By its series of positive terms.
    fn erf(x: f64) -> f64 {
        if x.is_nan() || x.abs() > 6.0 {
            return if x.is_nan() { x } else { x.signum() };
        }
        let (mut term, mut sum, mut n) = (x, x, 1.0);
        while term.abs() > 1e-18 * sum.abs() {
            term *= 2.0 * x * x / (2.0 * n + 1.0);
            sum += term;
            n += 1.0;
        }
        sum * std::f64::consts::FRAC_2_SQRT_PI * (-x * x).exp()
    }

    #[test]
    fn functions_are_near() {
        // Whose exponential is no normal number.
        let tiny = |x: f32| if x.abs() > 102.0 { x } else { -88.0 - 0.15 * x.abs() };
        let cases: [(&str, f64, f64); 6] = [
            ("exp", 0.87, worst(<f32 as Float>::exp, f64::exp)),
            ("exp, not normal", 0.76, worst(|x| <f32 as Float>::exp(tiny(x)), |x| f64::exp(tiny(x as f32).into()))),
            ("log", 0.51, worst(<f32 as Float>::log, f64::ln)),
            ("log1p", 0.51, worst(<f32 as Float>::log1p, f64::ln_1p)),
            ("tanh", 0.51, worst(<f32 as Float>::tanh, f64::tanh)),
            ("erf", 0.98, worst(<f32 as Float>::erf, erf)),
        ];
        for (name, bound, found) in cases {
            assert!(found <= bound, "{name}: {found} units in the last place");
        }
        let shares = (-90_000..90_000).map(|n| n as f32 * 1e-4).chain([f32::INFINITY, f32::NEG_INFINITY, f32::MAX]);
        let apart = |x: f32| (f64::from(x.twice_normal()) - 1.0 - erf(f64::from(x) / f64::sqrt(2.0))).abs();
        let found = shares.map(apart).fold(0.0, f64::max) * 2f64.powi(23);
        assert!(found <= 1.09, "the share of a normal distribution: {found} of 2^-23");
        assert!(f32::NAN.twice_normal().is_nan());
        let at = |function: fn(f32) -> f32, x: &[f32]| x.iter().map(|x| function(*x).to_bits()).collect::<Vec<_>>();
        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        let edges = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY];
        assert_eq!(at(Float::erf, &edges), bits(&[0.0, -0.0, 1.0, -1.0]));
        assert_eq!(at(Float::twice_normal, &edges), bits(&[1.0, 1.0, 2.0, 0.0]));
    }
}
