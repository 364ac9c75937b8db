"""Words that sentences about files are made of, this project's, those of the libraries that read, and the system's.

A file called not.png, or a folder called data, must not turn these words of a sentence into pseudonyms: where such a
word stands as a word, the sentence is the same for every file, and gives nothing away.
"""

from __future__ import annotations

ORDINARY = frozenset(
    """
a abort about above accepted access accessing across actual actually added address adobe advertise affine after again
alarm all allocate allocated allow allowed almost alpha already also although always among amount an analyze and anew
animation anomalous another antialias any anything appear applied appropriate are argb argument arguments arithmetic
around array arrays as ascii aside asked asks assign assuming at attached attempted attempting attribute available
avoided away axes axial axis back bad baseline basic be became because become been before begin begins behind being
below beside best better between beyond big bilateral bilinear bit bits black block bmp both bottom box brain broken
brought buffer builtins busy but by byte bytes call came can canceled cannot cast cause caused center certain change
changed channel character characters checksum child choose chunk chunks class cleaning clear closed cmyk code codes
color colour colours columns come comes command comments communication comparisons compatible complete complex
component components compressed concatenate config configuration conformant connected connection consistent contain
containing contains contours conversion convert copy coronal correct corrupt corrupted could count crashed create
creator cross cut damaged data dataset datatype day days deadlock decimal decode decoded decoder decoding decompress
decompressed default deferred define defined denied dependencies describes descriptor desired destination determine
device dicom dicomdir dictionary did died different dimension dimensional dimensions directly directory disk do
document documentation does domain done dose double down drawing drawn driver dropped dtype due duration during each
early either element elements else empty encapsulated encode encoded encoders encoding end endian endianness endpoint
engine enough entries entry equal error even ever every everything exact exactly example exceeded except exchange exif
exists exit expanding expected expecting expired explicit explicitly export exported extended extension extra factor
failed fails false family far fault few fiducials field file filename files final find finite first fit float floating
folder follow following font for format found fragment fragments frame frames free from full function get give given
global go good got gpl greater grey grid group gzip had half halted hand handle handler hard hardware has have he head
header headers held her here high highbit his holds hour how however huffman identified identifier identify if ignore
illegal image images img implemented imported in inappropriate included inclusive incomplete inconsistent incorrect
index indexing indices infinite info information input inputs inside install installed instance instances instead
insufficient int integer integers intercept interlaced interrupted into invalid inverted is it item items iterable its
itself jpeg just keep keeps kept key keyword kill killed kind know known knows label lacks large larger largest last
late later layout lead leading least left length less let level levels libjpeg libraries library licence lies like
limit limited line linear link links list listed lists little liver load loading locks long longer look lookup
lossless lossy luma machine made make makes managed many mapping marker markers mask match matching matrix matter max
maximum may me mean measurements media medical medium memory message meta metadata method methods might mine minute
minutes mismatch missing modality mode module more most mounted move much multi multibyte multihop multiple must my
name named names near nearly need needed needs negative network new next nibabel nifti no nobody non none nor normal
not nothing now number numbers numeric numerical numpy object objects of offset often old on once one only open opencv
operation option options or order orientation original other others ours ourselves out output outside over overflow
overlay own package padding page pair palette parsing part passed path per percentiles perhaps permission permitted
photo photometric picture pictures pillow pip pipe pixel pixelpadding pixels place places plan planar please plugin
plugins png point position positional positive possible precision predict prefix premature prematurely prepared
preprocess preprocessing present presentation private process processes progress progressive protocol pydicom pyjpegls
pylibjpeg python quite quota radiotherapy range rangelimit raster rather raw reached read readers reading readoptions
real reason recognized recommended record recoverable references refused regions registration regular rejected remote
removed replace report request requested required requires resampling rescaled rescaleslope reset reshape resize
resource resources restarted result results revoked rgb rgba rgbx right rle root route rows sagittal said same sample
samples save say says scale scaling scan scanner scans scheme score scored seconds section see seek seem seen segment
segmentation segmented segments selected selection semaphores send sequence series service set several severed shall
shape shared she short should show shrink shutdown side sigmoid signed since single singular size skipping slice
slices slicing slope slot small so socket software some something soon space spacing spatial specific specification
specified specify spectroscopy spectrum splice split stale standard started state stated step steps still stop stopped
storage store stored stores stream streams string strings structure structured study success such suitable supplied
support supported supports sure surface symbolic synchronized syntax system table tables tag tags take taken takes
tell tells temporarily terminated test text than that the them then there these they this though three through tiff
time timed timer times to together told too top tracks tractography trailing train transfer transform transparency
transport treatment tried true truncated try trying tuple turn turned two type types uid unable unavailable unchanged
uncompressed undefined under underflow unexpected unexpectedly ungood unique unit unknown unpack unreachable
unsupported until up us use used user using valid validation value values variable vector version vertices very view
volume volumes voxel voxels want warning was waveform way we webp weights well went were what whatever when where
which while who whole whom whose why wide width will window windowing windowwidth with without work world would write
writes writing wrong wrote ycbcr yes yet you your yourself zero zoom zooms
    """.split()  # noqa: SIM905 - a thousand quotation marks are harder to read
)
"""Lower case."""
