//! Images with a class each: IDX files (MNIST, Fashion-MNIST) and the binary files of CIFAR-10.
//!
//! An IDX file of images is followed by the one of their labels, as `cat images labels` makes it; each may be
//! packed by gzip, whose files can be joined in the same way. Pixels are bytes, row by row, the channels of a
//! pixel side by side.

use std::path::Path;

use super::captions::Captions;
use super::text::read_bytes;
use crate::error::{Error, Reason, Result};

/// Images of a data set.
const MAX_IMAGES: usize = 1 << 24;

/// Sides of an image.
const MAX_SIDE: usize = 4096;

/// Sides and channels of an image of CIFAR-10.
const CIFAR: [usize; 3] = [32, 32, 3];

/// Images in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Images {
    pub height: usize,
    pub width: usize,
    pub channels: usize,
    /// Image after image.
    pub pixels: Vec<u8>,
    /// The class of each.
    pub classes: Vec<u8>,
    /// What the classes are called, where the data set says.
    pub captions: Captions,
}

/// How a file is written, which its name tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// IDX: images, then their labels.
    Idx,
    /// The binary files of CIFAR-10.
    Cifar,
}

impl Images {
    /// Bytes of an image.
    pub fn image(&self) -> usize {
        self.height * self.width * self.channels
    }

    pub fn len(&self) -> usize {
        self.classes.len()
    }

    pub fn is_empty(&self) -> bool {
        self.classes.is_empty()
    }

    /// One more than the largest class.
    pub fn labels(&self) -> usize {
        self.classes.iter().max().map_or(0, |class| usize::from(*class) + 1)
    }

    /// The bytes of image `index`.
    pub fn get(&self, index: usize) -> &[u8] {
        &self.pixels[index * self.image()..][..self.image()]
    }

    /// Refuses images that a net of other sizes or classes cannot see.
    ///
    /// # Errors
    /// `DATASET_UNSUITABLE`.
    pub fn suits(
        &self,
        [height, width]: [usize; 2],
        channels: usize,
        classes: usize,
    ) -> Result<()> {
        if [self.height, self.width, self.channels] != [height, width, channels] {
            return Err(Error::new(
                Reason::DatasetUnsuitable,
                format!(
                    "the images are {} x {} with {} channels, the model is for {height} x {width} with \
                     {channels}; make a model with that image_size and num_channels",
                    self.height, self.width, self.channels
                ),
            ));
        }
        if self.labels() > classes {
            return Err(Error::new(
                Reason::DatasetUnsuitable,
                format!(
                    "the images have {} classes, the model knows {classes}; make one with that num_labels",
                    self.labels()
                ),
            ));
        }
        Ok(())
    }
}

/// Whether a file of this name is read as images.
pub fn is_images(file_name: &str) -> bool {
    format(file_name).is_ok()
}

/// Reads a file of images. `file_name` is the name that it came with, which tells its format: `.idx` or
/// `-ubyte` for IDX, `.bin` for CIFAR-10, each also with `.gz`. `max_bytes` bounds the unpacked size.
///
/// # Errors
/// `UNSUPPORTED_FORMAT` for other names, `TOO_LARGE` beyond the limits, `MALFORMED_FILE` with the byte for what
/// cannot be read, `DATASET_UNSUITABLE` when there is no image.
pub fn read(path: &Path, file_name: &str, max_bytes: u64) -> Result<Images> {
    let packed = file_name.to_ascii_lowercase().ends_with(".gz");
    let format = format(file_name)?;
    let bytes = read_bytes(path, packed, max_bytes).map_err(|error| error.within(file_name))?;
    parse(format, &bytes).map_err(|error| error.within(file_name))
}

/// The format that a file's name tells.
///
/// # Errors
/// `UNSUPPORTED_FORMAT`.
fn format(file_name: &str) -> Result<Format> {
    let name = file_name.to_ascii_lowercase();
    let stem = name.strip_suffix(".gz").unwrap_or(&name);
    if [".idx", "-ubyte", ".ubyte"].iter().any(|end| stem.ends_with(end)) {
        Ok(Format::Idx)
    } else if stem.ends_with(".bin") {
        Ok(Format::Cifar)
    } else {
        Err(Error::new(
            Reason::UnsupportedFormat,
            format!(
                "{file_name:.100}: the name ends in none of .idx, -ubyte and .bin (each also with .gz), which \
                 images are read from; rename or convert the file"
            ),
        ))
    }
}

/// Images from the bytes of a file, which are not packed.
///
/// # Errors
/// `MALFORMED_FILE` with the byte, `DATASET_UNSUITABLE` when there is no image.
pub fn parse(format: Format, bytes: &[u8]) -> Result<Images> {
    match format {
        Format::Idx => idx(bytes),
        Format::Cifar => cifar(bytes),
    }
}

/// Images and then their labels, both in the IDX format.
fn idx(bytes: &[u8]) -> Result<Images> {
    let (sides, pixels, rest) = array(bytes, 0)?;
    let [count, height, width, channels] = match sides[..] {
        [count, height, width] => [count, height, width, 1],
        [count, height, width, channels] => [count, height, width, channels],
        _ => {
            return Err(malformed(3, format!("{} dimensions are no images", sides.len())));
        }
    };
    if count == 0 {
        return Err(empty());
    }
    if count > MAX_IMAGES || height.max(width) > MAX_SIDE || height * width * channels == 0 {
        return Err(malformed(4, "images of sizes that are not taken here"));
    }
    let at = bytes.len() - rest.len();
    if rest.is_empty() {
        return Err(malformed(
            at,
            "the labels are missing; join the files: cat IMAGES LABELS > data.idx",
        ));
    }
    let (labels, classes, rest) = array(rest, at)?;
    if labels != [count] {
        let problem = format!(
            "labels of shape {labels:?} for {count} images; join files that belong together"
        );
        return Err(malformed(at, problem));
    }
    if !rest.is_empty() {
        return Err(malformed(bytes.len() - rest.len(), "something follows the labels"));
    }
    let (pixels, classes) = (pixels.to_vec(), classes.to_vec());
    Ok(Images { height, width, channels, pixels, classes, captions: Captions::default() })
}

/// One IDX array of bytes: its shape, its elements, and what follows. `at` is its place in the file.
fn array(bytes: &[u8], at: usize) -> Result<(Vec<usize>, &[u8], &[u8])> {
    let short = || malformed(at + bytes.len(), "the file ends in the middle of an array");
    let head = bytes.get(..4).ok_or_else(short)?;
    let dimensions = usize::from(head[3]);
    if head[..3] != [0, 0, 8] || !(1..=4).contains(&dimensions) {
        return Err(malformed(
            at,
            "no array of bytes in the IDX format begins here (00 00 08 and 1 to 4 dimensions)",
        ));
    }
    let sizes = bytes.get(4..4 + 4 * dimensions).ok_or_else(short)?;
    let mut sides = Vec::with_capacity(dimensions);
    for size in sizes.chunks_exact(4) {
        sides.push(u32::from_be_bytes([size[0], size[1], size[2], size[3]]) as usize);
    }
    let elements = sides.iter().try_fold(1usize, |all, side| all.checked_mul(*side));
    let start = 4 + 4 * dimensions;
    let end = elements.and_then(|elements| start.checked_add(elements)).ok_or_else(short)?;
    let data = bytes.get(start..end).ok_or_else(short)?;
    Ok((sides, data, &bytes[end..]))
}

/// Records of a class and an image, its red, green and blue parts one after another.
fn cifar(bytes: &[u8]) -> Result<Images> {
    let [height, width, channels] = CIFAR;
    let part = height * width;
    let record = 1 + part * channels;
    if bytes.is_empty() {
        return Err(empty());
    }
    if !bytes.len().is_multiple_of(record) {
        let whole = bytes.len() / record * record;
        return Err(malformed(whole, format!("the last record has not {record} bytes")));
    }
    let count = bytes.len() / record;
    if count > MAX_IMAGES {
        return Err(malformed(0, "more images than are taken here"));
    }
    let mut pixels = vec![0; count * part * channels];
    let mut classes = Vec::with_capacity(count);
    for (i, record) in bytes.chunks_exact(record).enumerate() {
        if record[0] > 9 {
            let problem = format!("class {} where CIFAR-10 has 0 to 9", record[0]);
            return Err(malformed(i * record.len(), problem));
        }
        classes.push(record[0]);
        let image = &mut pixels[i * part * channels..][..part * channels];
        for (channel, values) in record[1..].chunks_exact(part).enumerate() {
            for (pixel, value) in values.iter().enumerate() {
                image[pixel * channels + channel] = *value;
            }
        }
    }
    Ok(Images { height, width, channels, pixels, classes, captions: Captions::default() })
}

fn malformed(at: usize, what: impl std::fmt::Display) -> Error {
    Error::new(Reason::MalformedFile, format!("byte {at}: {what}"))
}

fn empty() -> Error {
    Error::new(Reason::DatasetUnsuitable, "there is no image in it; choose another file")
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::*;

    fn packed(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn images() -> Vec<u8> {
        let mut bytes = vec![0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0, 3];
        bytes.extend(0..12);
        bytes
    }

    const LABELS: [u8; 10] = [0, 0, 8, 1, 0, 0, 0, 2, 7, 1];

    fn read_as(name: &str, bytes: &[u8]) -> Result<Images> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        read(file.path(), name, 1 << 20)
    }

    #[test]
    fn joined_files_are_images_with_their_labels() {
        let plain = read_as("a.idx", &[&images()[..], &LABELS].concat()).unwrap();
        assert_eq!((plain.height, plain.width, plain.channels, plain.len()), (2, 3, 1, 2));
        assert_eq!((plain.get(1), plain.labels()), (&[6u8, 7, 8, 9, 10, 11][..], 8));
        assert_eq!(plain.classes, [7, 1]);
        let joined = [packed(&images()), packed(&LABELS)].concat();
        assert_eq!(read_as("train-images-idx3-ubyte.gz", &joined).unwrap(), plain);
        plain.suits([2, 3], 1, 8).unwrap();
        assert!(plain.suits([3, 2], 1, 8).unwrap_err().message().contains("image_size"));
        assert!(plain.suits([2, 3], 1, 7).unwrap_err().message().contains("num_labels"));
    }

    #[test]
    fn colours_stand_side_by_side() {
        let mut record = vec![3u8];
        for channel in 0..3u8 {
            record.extend((0..1024).map(|i| if i == 5 { channel + 1 } else { 0 }));
        }
        let images =
            read_as("data_batch_1.bin", &[record.clone(), record.clone()].concat()).unwrap();
        assert_eq!((images.len(), images.image()), (2, 3072));
        assert_eq!(images.get(1)[15..18], [1, 2, 3]);
        record[0] = 10;
        let error = read_as("x.bin.gz", &packed(&record)).unwrap_err();
        assert!(error.message().contains("byte 0: class 10"), "{error}");
        assert!(read_as("x.bin", &record[..3000]).is_err());
        assert!(read_as("x.bin", &[]).is_err());
    }

    #[test]
    fn what_is_wrong_is_said() {
        let whole = [&images()[..], &LABELS].concat();
        for (bytes, what) in [
            (images(), "labels are missing"),
            ([&images()[..], &LABELS[..9]].concat(), "in the middle"),
            ([&images()[..], &[0, 0, 8, 1, 0, 0, 0, 1, 7]].concat(), "belong together"),
            ([&whole[..], &[1]].concat(), "follows"),
            ([&[0, 0, 9][..], &whole[3..]].concat(), "IDX"),
            (
                vec![0, 0, 8, 3, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255],
                "middle",
            ),
            (vec![0, 0, 8, 3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 2], "no image"),
            (vec![0, 0, 8, 1, 0, 0, 0, 1, 5], "no images"),
            (Vec::new(), "in the middle"),
        ] {
            let error = read_as("a.idx", &bytes).unwrap_err();
            assert!(error.message().contains(what), "{what}: {error}");
        }
        let error = read_as("a.png", &whole).unwrap_err();
        assert_eq!(error.reason(), Reason::UnsupportedFormat);
        assert!(read_as("a.idx.gz", &whole).is_err());
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &whole).unwrap();
        assert_eq!(read(file.path(), "a.idx", 20).unwrap_err().reason(), Reason::TooLarge);
        // No damage makes it panic or take memory that the file does not have.
        for at in 0..whole.len() {
            for value in [0, 1, 0x7f, 0xff] {
                let mut bytes = whole.clone();
                bytes[at] = value;
                let _ = idx(&bytes);
            }
            assert!(idx(&whole[..at]).is_err());
        }
    }
}
