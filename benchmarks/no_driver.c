/* In place of libcuda.so.1 where there is no driver, for benchmarks/fused.py: cuDNN loads each kernel that it has compiled before it
   lets a plan be saved. Loading succeeds here; cuInit fails, so that nothing takes this for a GPU. */
static int nothing;
int cuInit(unsigned flags) { return 100; } /* CUDA_ERROR_NO_DEVICE */
int cuLibraryLoadData(void **library) { *library = &nothing; return 0; }
int cuLibraryGetKernel(void **kernel) { *kernel = &nothing; return 0; }

/* What else cuDNN looks up. */
#define F(name) int name(void) { return 0; }
F(cuCtxGetCurrent) F(cuCtxGetLimit) F(cuCtxPopCurrent) F(cuCtxPushCurrent) F(cuDeviceGet) F(cuDeviceGetCount) F(cuDriverGetVersion)
F(cuGetErrorName) F(cuGetErrorString) F(cuKernelGetAttribute) F(cuKernelSetAttribute) F(cuLaunchCooperativeKernel) F(cuLaunchKernel)
F(cuLaunchKernelEx) F(cuLibraryLoadFromFile) F(cuLibraryUnload) F(cuLinkAddData) F(cuLinkComplete) F(cuLinkCreate) F(cuLinkDestroy)
F(cuOccupancyMaxPotentialClusterSize) F(cuStreamGetCtx)
