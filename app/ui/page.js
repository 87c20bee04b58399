// What is copied is what was said: the sign that keeps a chat's text from being markup (app/conversation.py) stays here.
const plain = (text) => String(text).replaceAll("\u2060", "");
document.addEventListener("copy", (event) => {
  const text = String(document.getSelection());
  if (!text.includes("\u2060")) return;
  event.clipboardData.setData("text/plain", plain(text));
  event.preventDefault();
});
if (navigator.clipboard) {
  const write = navigator.clipboard.writeText.bind(navigator.clipboard);
  navigator.clipboard.writeText = (text) => write(plain(text));
}
