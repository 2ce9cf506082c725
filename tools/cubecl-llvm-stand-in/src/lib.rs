//! Stands in for the crate through which CubeCL calls LLVM, where only the types are asked for: gate builds without
//! LLVM.

pub mod nvptx {
    pub mod ptx_version {
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub struct PtxVersion(u32);
        impl PtxVersion {
            pub fn for_driver(driver: i32) -> Option<Self> {
                // Only names a cache namespace here.
                (driver >= 10000).then(|| Self(driver as u32))
            }
        }
        impl core::fmt::Display for PtxVersion {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                write!(f, "ptx{}", self.0)
            }
        }
    }
}
pub mod shared {
    pub mod lowered_features {
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum GpuTarget { Nvptx }
        pub fn restrict_features(_props: &mut cubecl_core::ir::DeviceProperties, _target: GpuTarget) {
            panic!("cubecl-llvm stand-in: enable cubecl's `cuda-cpp` feature");
        }
    }
}
use cubecl_core::ir::nvidia::SmArch;
use cubecl_core::prelude::KernelDefinition;
use cubecl_core::Compiler;
use cubecl_environment::backtrace::BackTrace;
use cubecl_runtime::{compiler::CompilationError, kernel::BufferIOAttr};
use nvptx::ptx_version::PtxVersion;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LlvmTarget { #[default] Nvptx }
#[derive(Clone, Debug, Default)]
pub struct PlironCompiler { pub target: LlvmTarget }
#[derive(Clone, Debug, Default)]
pub struct PlironOptions {
    pub arch: Option<()>,
    pub sm_arch: Option<SmArch>,
    pub ptx_version: Option<PtxVersion>,
    pub grid_constants: bool,
    #[doc(hidden)] pub _non_exhaustive: (),
}
#[derive(Clone, Debug)]
pub struct NvptxModule {
    pub ptx: Vec<core::ffi::c_char>,
    pub entrypoint: String,
    pub ir: String,
    pub shared_memory_size: usize,
    pub io: Vec<BufferIOAttr>,
}
#[derive(Clone, Debug)]
pub enum PlironArtifact { NvptxCode(NvptxModule), Unreachable }
impl core::fmt::Display for PlironArtifact {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result { write!(f, "stub") }
}
impl Compiler for PlironCompiler {
    type Representation = PlironArtifact;
    type CompilationOptions = PlironOptions;
    fn compile(&mut self, _k: KernelDefinition, _o: &PlironOptions) -> Result<PlironArtifact, CompilationError> {
        Err(CompilationError::Generic {
            reason: "cubecl-llvm stand-in: enable cubecl's `cuda-cpp` feature".into(),
            backtrace: BackTrace::capture(),
        })
    }
    fn extension(&self) -> &'static str { "ll" }
    fn lang_tag(&self) -> &'static str { "llvm" }
}
